"""Profile and Cluster to Plan. Table of contents."""

from weft.planner.changes import Change, changes
from weft.planner.evaluate import StageRow
from weft.planner.face import is_inference, plan
from weft.planner.inference import InferenceChoice, choose_inference, estimate_inference
from weft.planner.objectives import OBJECTIVES, choose
from weft.planner.search import Alternative, Choice, estimate, make_plan, search
from weft.planner.space import Constraints, Keywords, Refused

__all__ = [
    "OBJECTIVES",
    "Alternative",
    "Change",
    "Choice",
    "Constraints",
    "InferenceChoice",
    "Keywords",
    "Refused",
    "StageRow",
    "changes",
    "choose",
    "choose_inference",
    "estimate",
    "estimate_inference",
    "is_inference",
    "make_plan",
    "plan",
    "search",
]
