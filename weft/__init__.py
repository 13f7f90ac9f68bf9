"""weft: train an unmodified single-device PyTorch model on many devices."""

from weft.cluster import Cluster
from weft.errors import InputError, JobError, WeftError
from weft.plan import Plan
from weft.runtime.engine import Engine, parallelize
from weft.runtime.launch import launch
from weft.workload import Workload

__all__ = [
    "Cluster",
    "Engine",
    "InputError",
    "JobError",
    "Plan",
    "WeftError",
    "Workload",
    "launch",
    "parallelize",
]
__version__ = "0.1.0"
