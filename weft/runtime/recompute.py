"""Recompute: a unit whose activations are dropped after its forward and computed again when its backward begins.

Around the unit's own forward, by ``torch.utils.checkpoint``: hooks of data and tensor parallelism around the unit stay
outside, hooks of its submodules run again, in the same order on every rank.

    full         what enters the unit is kept
    selective    the results of matrix products, convolutions and attention are kept, too; what is cheap is done again

The second run must do what the first did. So it draws from the call's own random stream (placement opens it inside),
is given objects as they were (a cache that the first run filled), and reads buffers as they were; what it writes to
buffers is thrown away. Code that has effects elsewhere can ask ``recomputing()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from weft.capture.isolation import snapshot
from weft.capture.recomputation import is_costly, keeps_selected
from weft.capture.recording import Cost

Call = Callable[..., Any]
Buffers = dict[tuple[nn.Module, str], Tensor]
"""Buffers by the module that has them and their name in it."""

_again: ContextVar[bool] = ContextVar("recomputing", default=False)


def recomputing() -> bool:
    """Whether the forward that is running is the second one of a unit, for its backward: it must leave no trace."""
    return _again.get()


class Recompute:
    """Runs one unit's forward so that its activations need not be kept.

    Args:
        module: the unit.
        mode: ``"full"`` or ``"selective"``.
    """

    def __init__(self, module: nn.Module, mode: str) -> None:
        self.module, self.mode = module, mode
        self._changing: set[tuple[nn.Module, str]] | None = None
        self._selective: dict[int, tuple[Cost, bool]] = {}

    def __call__(self, forward: Call, args: Any, kwargs: Any, cost: Cost) -> Any:
        """What ``forward(*args, **kwargs)`` gives; ``cost`` is what was recorded of such a call."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        entered = [leaf if isinstance(leaf, Tensor) else snapshot(leaf) for leaf in leaves]
        before = {place: buffer.clone() for place, buffer in self._buffers() if self._may_change(place)}
        bound = dict(self._buffers())
        versions = {place: buffer._version for place, buffer in bound.items()}
        modes = _function_modes()

        def run() -> Any:
            if not recomputing():
                return forward(*args, **kwargs)
            again_args, again_kwargs = tree_unflatten(entered, spec)
            with _inside(modes):
                return forward(*again_args, **again_kwargs)

        output = checkpoint(
            run, use_reentrant=False, preserve_rng_state=False, context_fn=partial(self._contexts, cost, before)
        )
        self._changing = (self._changing or set()) | {
            place for place, now in self._buffers() if now is not bound.get(place) or now._version != versions[place]
        }
        # The casts of autocast are kept for the rest of the forward, or longer only by who needs them.
        torch.clear_autocast_cache()
        return output

    def _contexts(self, cost: Cost, before: Buffers) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first: AbstractContextManager[Any] = nullcontext()
        second: AbstractContextManager[Any] = nullcontext()
        if self.mode == "selective" and self._keeps(cost):
            first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]  # torch's
        return first, _Again(partial(self._buffers_as, before), second)

    def _keeps(self, cost: Cost) -> bool:
        """Whether the results that would be kept stay as they are: the unit may write to them."""
        if id(cost) not in self._selective:
            self._selective[id(cost)] = (cost, keeps_selected(cost.forward))
        return self._selective[id(cost)][1]

    def _buffers(self) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield (module, name), buffer

    def _may_change(self, place: tuple[nn.Module, str]) -> bool:
        return self._changing is None or place in self._changing

    @contextmanager
    def _buffers_as(self, before: Buffers) -> Iterator[None]:
        """Let the unit work on copies of its buffers.

        All are copied: some operations (batch normalisation's) write to buffers without a sign of it. Those do not
        read what they write.
        """
        now = dict(self._buffers())
        for (module, name), buffer in now.items():
            module._buffers[name] = before.get((module, name), buffer).clone()
        try:
            yield
        finally:
            for (module, name), buffer in now.items():
                module._buffers[name] = buffer


def _function_modes() -> list[TorchFunctionMode]:
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]  # torch's


@contextmanager
def _inside(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Under the function modes (a default device is one) that the first run was under; a backward is under none."""
    active = _function_modes()
    with ExitStack() as stack:
        for mode in modes:
            if mode not in active:
                stack.enter_context(mode)
        yield


def _policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_costly(func) else CheckpointPolicy.PREFER_RECOMPUTE


class _Again(AbstractContextManager[None]):
    """The second run: ``recomputing()`` says so, buffers are copies, and then another context.

    In this order: selective recomputation counts operations, and the copies are none of the unit's.
    """

    def __init__(
        self, buffers: Callable[[], AbstractContextManager[None]], context: AbstractContextManager[Any]
    ) -> None:
        self._buffers, self._context = buffers, context

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.callback(_again.reset, _again.set(True))
            stack.enter_context(self._buffers())
            stack.enter_context(self._context)
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)
