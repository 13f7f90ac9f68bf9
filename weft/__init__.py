"""weft: train an unmodified single-device PyTorch model on many devices."""

from weft.cluster import Cluster
from weft.engines import parallelize
from weft.errors import InputError, JobError, WeftError
from weft.inference.engine import InferenceEngine
from weft.jobs.verify import Verification, verify
from weft.plan import Plan
from weft.planner import plan
from weft.runtime.engine import Engine
from weft.runtime.launch import launch
from weft.workload import Parameters, Workload

__all__ = [
    "Cluster",
    "Engine",
    "InferenceEngine",
    "InputError",
    "JobError",
    "Parameters",
    "Plan",
    "Verification",
    "WeftError",
    "Workload",
    "launch",
    "parallelize",
    "plan",
    "verify",
]
__version__ = "0.1.0"
