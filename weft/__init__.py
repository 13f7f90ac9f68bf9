"""weft: train an unmodified single-device PyTorch model on many devices."""

from weft.errors import InputError, JobError, WeftError
from weft.plan import Plan
from weft.workload import Workload

__all__ = [
    "InputError",
    "JobError",
    "Plan",
    "WeftError",
    "Workload",
]
__version__ = "0.1.0"
