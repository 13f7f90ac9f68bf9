"""Profile and Cluster to Plan. Table of contents."""

from weft.planner.changes import Change, changes
from weft.planner.evaluate import StageRow
from weft.planner.face import plan
from weft.planner.objectives import OBJECTIVES, choose
from weft.planner.search import Alternative, Choice, estimate, make_plan, search
from weft.planner.space import Constraints, Keywords, Refused

__all__ = [
    "OBJECTIVES",
    "Alternative",
    "Change",
    "Choice",
    "Constraints",
    "Keywords",
    "Refused",
    "StageRow",
    "changes",
    "choose",
    "estimate",
    "make_plan",
    "plan",
    "search",
]
