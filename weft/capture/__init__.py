"""Capture: from a Workload to its Profile.

units       which modules are placed as a whole
tape        operations recorded on fake tensors and replayed for real
initial     the model without memory, and the single device's initial weights on whoever owns them
operations  what one operation costs
trace       what the dispatcher sees: operations, live bytes, where tensors come from
blocks      whether two modules run the same operations
recorder    one run of the loss, cut into calls of units
tensor      what tensor parallelism can divide
capture     all of it: ``capture(workload)``
profile     the result: plain numbers, no torch
"""

from weft.capture.capture import capture
from weft.capture.profile import Profile

__all__ = ["Profile", "capture"]
