"""Setting: the tensors a loss is recorded on. Fake ones; or, where the glue cannot do without values, real ones, of
which a unit's weights exist only while the unit runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from weft.capture.alone import made_up, real_weights
from weft.capture.draws import python_draws, python_stream
from weft.capture.initial import FakeModel, materialize
from weft.capture.names import Names
from weft.capture.trace import Trace


@dataclass(frozen=True)
class Setting:
    """How a loss is recorded.

    Attributes:
        given: the model, or what ``build_fake`` gave.
        units: names of its units.
        seed: of the glue's draws.
        forced: instead of drawing, let uniform numbers be this.
        real: whether the glue runs on real tensors.
    """

    given: nn.Module | FakeModel
    units: Sequence[str]
    seed: int
    forced: float | None
    real: bool

    @property
    def model(self) -> nn.Module:
        """The module."""
        return self.given if isinstance(self.given, nn.Module) else self.given.model

    @contextmanager
    def entered(self, trace: Trace, names: Names) -> Iterator[None]:
        """Run what is inside on these tensors; ``names`` are those of the model's tensors by id."""
        with ExitStack() as stack:
            if self.forced is None:
                stack.enter_context(python_stream(self.seed, when=True))
            else:
                stack.enter_context(python_draws(self.forced))
            if self.real:
                owned = {m for name in self.units for m in self.model.get_submodule(name).modules()}
                outside = [m for m in self.model.modules() if m not in owned]
                stack.enter_context(_disable_current_modes())
                stack.enter_context(torch.random.fork_rng(devices=[]))
                stack.enter_context(real_weights(outside, self.weights, names, trace, deep=False))
            else:
                stack.enter_context(trace.mode)
            yield

    def inputs(self, batch: Any, trace: Trace) -> Any:
        """The batch as the loss is given it."""
        if self.real:
            return tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), batch)
        fakes: dict[int, Tensor] = {}
        for number, leaf in enumerate(tree_leaves(batch)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
                fakes[id(leaf)] = trace.mode.from_tensor(leaf)
                trace.known.leaf(fakes[id(leaf)], leaf, number)
        return tree_map_only(Tensor, lambda t: fakes.get(id(t), t), batch)

    def weights(self, fakes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Real tensors for some of the model's: the initial ones, if they can be known."""
        if isinstance(self.given, FakeModel):
            return materialize(self.given, dict.fromkeys(fakes))
        return {name: made_up(fake) for name, fake in fakes.items()}
