"""Capture: from a Workload to its Profile.

units       which modules are placed as a whole
tape        operations recorded on fake tensors
replay      and run for real, as far as somebody wants their results
initial     the model without memory, and the single device's initial weights on whoever owns them
operations  what one operation costs
frames      what is written down of a stretch of a run
draws       random operations of the glue, each from a stream of its own
known       values that follow from the batch and from draws; what a recording depends on
trace       what the dispatcher sees: operations, live bytes, where tensors come from
blocks      whether two modules run the same operations
blame       where in the user's code something went wrong
border      tensors that cross from the glue into a unit's call and back
trees       what a unit returns, objects of its own included
effects     tensors a unit leaves in objects it was given
names       first names of the model's tensors
alone       a unit's call run by itself, on fake tensors or on real ones
setting     the tensors a loss is recorded on
losses      what a loss may return
isolation   running a model leaves no trace in it
recording   a run of the loss as data: calls of units, and what each kind of call costs
kinds       recorded calls that stand for later ones like them
recorder    makes one: ``record(model, units, loss, batch)``
sharding    how a divided dimension travels through operations
groups      the search for groups of projections in a call
tensor      what tensor parallelism can divide: ``tensor_groups(recording, model)``
capture     all of it: ``capture(workload)``
profile     the result: plain numbers, no torch
"""

from weft.capture.capture import capture
from weft.capture.profile import Profile

__all__ = ["Profile", "capture"]
