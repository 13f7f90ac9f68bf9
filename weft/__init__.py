"""weft: train an unmodified single-device PyTorch model on many devices.

A public name is imported when it is first asked for: every process of a job imports this package, and few need all.
"""

import importlib
from typing import TYPE_CHECKING, Any

from weft.errors import InputError, JobError, WeftError
from weft.plan import Plan

if TYPE_CHECKING:
    from weft.cluster import Cluster
    from weft.engines import parallelize
    from weft.inference.engine import InferenceEngine
    from weft.inference.pretrained import pretrained
    from weft.jobs.verify import Verification, verify
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
    "pretrained",
    "verify",
]
__version__ = "0.1.0"

if not TYPE_CHECKING:  # type checkers read the imports above, and know that there is nothing else
    HOMES = {
        "Cluster": "weft.cluster",
        "Engine": "weft.runtime.engine",
        "InferenceEngine": "weft.inference.engine",
        "Parameters": "weft.workload",
        "Verification": "weft.jobs.verify",
        "Workload": "weft.workload",
        "launch": "weft.runtime.launch",
        "parallelize": "weft.engines",
        "plan": "weft.planner",
        "pretrained": "weft.inference.pretrained",
        "verify": "weft.jobs.verify",
    }

    def __getattr__(name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    del plan  # the module that Plan came from, bound here by its import, which happens once
