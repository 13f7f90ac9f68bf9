"""Experts: the parameters of which every token uses some, and what the ranks of ``ep`` exchange for them.

Experts are told by how they compute, not by name: a module whose weights are no projections (``capture.scopes``) and
have three dimensions, of which the first, equal for all of them, is the number of experts, and another is divided by
tensor parallelism. Experts that a model keeps as a list of modules look like any list of layers and are not told.

Ranks of ``ep`` are among the ``tp x cp x data parallel`` ranks of a stage. Each keeps a part of the experts, of which
``etp`` ranks divide each; the ``tp x cp x dp / (ep x etp)`` ranks that keep the same average its gradients, and shard
it where the others are sharded. A token goes to its experts and back:

    dispatch, combine      all_to_all of rows x hidden size        in the forward; the same again in the backward

where ``rows`` are the tokens of the rank times the experts of each (Lepikhin et al. 2021, GShard; Megatron-LM's
all-to-all dispatcher). With equal loads each rank computes as much as without ``ep``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft.capture.profile import NO_GROUP, Affine, Call, Parameter, Profile


@dataclass(frozen=True)
class Experts:
    """The experts of a profile.

    Attributes:
        counts: how many, by the tensor group that divides them.
        names: of their parameters.
    """

    counts: Mapping[int, int]
    names: frozenset[str]

    @classmethod
    def of(cls, profile: Profile) -> Experts:
        """Those that a profile shows."""
        found: dict[int, dict[str, Parameter]] = {}
        for name, parameter in profile.parameters.items():
            if parameter.group != NO_GROUP and len(parameter.shape) == 3 and parameter.tensor_dim != 0:
                styles = profile.tensor_groups[parameter.group].styles
                owner = max(parameter.names, key=len).rpartition(".")[0]
                if any(owner == module and style.name == "reduce" for module, style in styles):
                    found.setdefault(parameter.group, {})[name] = parameter
        alike = {g: own for g, own in found.items() if len({p.shape[0] for p in own.values()}) == 1}
        counts = {g: next(iter(own.values())).shape[0] for g, own in alike.items()}
        return cls(counts, frozenset(name for own in alike.values() for name in own))

    def routed(self, profile: Profile, call: Call) -> Affine:
        """Bytes of a call's tokens, once for each of their experts."""
        fixed = per_sample = 0.0
        for group in self.counts:
            products = [op for op in call.forward if op.group == group and op.kind == "matmul"]
            own = [p for n in call.parameters if n in self.names and (p := profile.parameters[n]).group == group]
            if products and own:
                (first, *_), each = own, sum(p.elements for p in own) / self.counts[group]  # weights of an expert
                hidden = first.shape[3 - (first.tensor_dim or 1)]
                scale = hidden * first.bytes / first.elements / (2 * each)  # a row does two operations with a weight
                fixed += scale * sum(op.flops.fixed for op in products)
                per_sample += scale * sum(op.flops.per_sample for op in products)
        return Affine(fixed, per_sample)

    def refuse(self, ep: int) -> str | None:
        """Why they cannot be divided among so many ranks; None if they can."""
        if not self.counts:
            return "this model has no experts"
        return next((f"{n} experts are not divisible by {ep}" for n in self.counts.values() if n % ep), None)
