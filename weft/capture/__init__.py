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
enclosing   units that have to be placed with the module around them
effects     tensors a unit leaves in objects it was given
names       first names of the model's tensors
alone       a unit's call run by itself, on fake tensors or on real ones
setting     the tensors a loss is recorded on
losses      what a loss may return
isolation   running a model leaves no trace in it
recording   a run of the loss as data: calls of units, and what each kind of call costs
retracing   whether a block does what a recorded one did
kinds       recorded calls that stand for later ones like them
recorder    makes one: ``record(model, units, loss, batch)``
recomputation
            what is kept and done again where activations are recomputed
alignment   tensor groups carried over to a recording in a lower precision
sharding    divided and partial values, and how they are reshaped
shadows     how whole values would be divided, were a parameter
rules       how they travel through an operation, operator by operator
products    ... through matrix products, attention, convolutions
following   one pass over a unit that divides every projection
shares      one rank's part of a unit
rehearsal   running a unit on shares
comparison  whether it then does what the whole unit does
groups      what is divided together, and a unit as the searches see it
numbers     head counts in attributes, which code on shares needs divided
pairs       groups between projections that make features and those that contract them
scopes      modules with several weights of their own: experts
singles     modules divided by themselves
tensor      what tensor parallelism can divide: ``tensor_groups(recording, model)``
lines       two sizes of the batch, and the straight line through both
merging     recordings at both sizes as calls
capture     all of it: ``capture(workload)``
forward     forwards alone, as a loss that costs nothing
standing    caches that a model of transformers is recorded with
lengths     tensor groups carried over to sequences of another length, with a cache
inference   profiles of forwards alone: ``capture_inference(workload)``
profile     the result: plain numbers, no torch
"""

from weft.capture.capture import capture
from weft.capture.inference import capture_inference
from weft.capture.profile import Generation, Profile

__all__ = ["Generation", "Profile", "capture", "capture_inference"]
