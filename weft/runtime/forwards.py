"""Forwards: a function of the model computed by all stages of a pipeline, with no backward.

Every stage runs its own calls, on what it receives from earlier stages, and sends on what later ones need, as the
function's recording says. Sends do not wait, so a stage that is done with one microbatch begins the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from weft.adapters import running
from weft.capture.forward import as_loss
from weft.capture.profile import Source
from weft.capture.recorder import Recording
from weft.errors import ModelError
from weft.plan import Plan
from weft.precision import in_precision
from weft.runtime.elastic import Elastic, Known, Like
from weft.runtime.ending import Ending, Function
from weft.runtime.grid import Grid
from weft.runtime.placement import Placement, Run
from weft.runtime.randomness import Seeds
from weft.runtime.recordings import Recordings
from weft.runtime.routes import Routes
from weft.runtime.whole import Whole
from weft.workload import Workload

KEYS = 16
"""What else shapes may depend on, that is remembered."""


class Forwards:
    """One function of the model, on one stage.

    Args:
        function: of the model and a microbatch; what it gives is real on the last stage.
        workload, plan, grid: of the job.
        placement: this stage's view of the model.
        whole: the root of what is gathered, if anything is.
        units: names of the units that the plan places.
        trained: whether the model is trained too. If not, what a forward leaves in it need not take part in a backward,
            and every operation costs less (``torch.inference_mode``).
    """

    def __init__(
        self,
        function: Function,
        workload: Workload,
        plan: Plan,
        grid: Grid,
        *,
        placement: Placement,
        whole: Whole | None,
        units: list[str],
        trained: bool,
    ) -> None:
        self.plan, self.grid, self.placement, self.stage = plan, grid, placement, grid.stage
        self._seed = workload.seed
        self._recordings = self.recordings_of(function, workload, plan)
        self._recordings.units = units
        self._ending = Ending(placement.model, function) if plan.pp > 1 else None
        run = in_precision(replace(workload, loss=function), plan.precision).loss
        if self._ending is not None:
            run = self._ending.of(run)
        self._function: Function = run if whole is None else whole.of(run)
        self._routes: WeakKeyDictionary[Recording, Routes] = WeakKeyDictionary()
        self._elastic: dict[Hashable, Elastic] = {}
        self._no_backward = torch.no_grad if trained else torch.inference_mode
        self._sends: deque[list[tuple[dist.Work, Tensor]]] = deque()

    @staticmethod
    def recordings_of(function: Function, workload: Workload, plan: Plan) -> Recordings:
        """Recordings of a function of a workload's model."""
        return Recordings(in_precision(replace(workload, loss=as_loss(function)), plan.precision), inferring=True)

    def run(self, microbatch: Any, *, like: Like | None = None) -> Any:
        """The function of a microbatch: what it gives on the last stage, nothing of use on the others.

        Args:
            microbatch: the same on every stage.
            like: what is recorded in its place, of a function that draws no random numbers, for a microbatch that is on
                this rank's device; None: it is recorded itself.

        Raises:
            ModelError: the model took another way than the recording.
        """
        device = self.grid.device
        if like is not None and self.plan.pp == 1:  # nothing travels, and nobody draws
            with self._no_backward(), running(device):
                return self._function(self.placement.model, microbatch)
        microbatch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, microbatch)
        seeds = Seeds(self._seed, 0, 0, 0)
        known = self._known_of(microbatch, seeds) if like is None else self._known_like(like, seeds)
        recording, routes, squares = known
        if self.stage not in routes.stage_of:
            return None
        run = Run(recording, routes, self._receive(routes, squares), seeds, ending=self._ending)
        with self._no_backward():
            result = self.placement.forward(self._function, microbatch, run)
        self._send(run, squares)
        return result

    def alike(self) -> AbstractContextManager[None]:
        """Around many runs with ``like``, and no others: they take less time."""
        return self.placement.aside() if self.plan.pp == 1 else nullcontext()

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        while self._sends:
            self._wait()

    def _wait(self) -> None:
        """Wait until what the oldest forward sent has left."""
        for work, _ in self._sends.popleft():
            work.wait()

    def _known_of(self, microbatch: Any, seeds: Seeds) -> Known:
        recording = self._recordings.of(microbatch, seeds)
        if recording not in self._routes:
            self._routes[recording] = Routes.find(recording, self.plan, leaves_out=True)
        return Known(recording, self._routes[recording], frozenset())

    def _known_like(self, like: Like, seeds: Seeds) -> Known:
        if like.key not in self._elastic:

            def record(sequences: int, tokens: int) -> Recording:
                return self._recordings.of(like.form(sequences, tokens), seeds)

            self._elastic[like.key] = Elastic(record, self.plan)
            if len(self._elastic) > KEYS:
                del self._elastic[next(iter(self._elastic))]
        return self._elastic[like.key].of(like.sequences, like.tokens)

    def _receive(self, routes: Routes, squares: frozenset[Source]) -> dict[Source, Tensor]:
        received: dict[Source, Tensor] = {}
        works = []
        group = self.grid.group("pp")
        for peer, sources in routes.received_by(self.stage).items():
            for source in sources:
                leaf = routes.leaves[source]
                shape = list(leaf.shape)
                if source in squares:
                    told = torch.empty(len(shape), dtype=torch.long, device=self.grid.device)
                    dist.recv(told, group=group, group_src=peer)
                    shape = told.tolist()
                received[source] = torch.empty(shape, dtype=leaf.dtype, device=self.grid.device)
                works.append(dist.irecv(received[source], group=group, group_src=peer))
        for work in works:
            assert work is not None
            work.wait()
        return received

    def _send(self, run: Run, squares: frozenset[Source]) -> None:
        """Begin to send what later stages need. No more than so many forwards' sends are under way: a stage that is
        faster than the next waits, before its memory is full. (Gloo knows that a send is over only when asked to wait.)
        """
        while len(self._sends) > 2 * self.plan.microbatches:
            self._wait()
        sends: list[tuple[dist.Work, Tensor]] = []
        self._sends.append(sends)
        for peer, sources in run.routes.sent_by(self.stage).items():
            for source in sources:
                leaf = run.routes.leaves[source]
                tensor = run.produced.get(source)
                if tensor is None or (tuple(tensor.shape) != leaf.shape and source not in squares):
                    name = run.recording.calls[source.call].name
                    raise ModelError(
                        f"{name} was not called, or returned a tensor of another shape than {leaf.shape}, and another "
                        "stage waits for it; the forward depends on the data. Keep it on one stage, or use pp=1"
                    )
                if source in squares:
                    sends.append(self._posted(torch.tensor(tensor.shape, device=self.grid.device), peer))
                sends.append(self._posted(tensor.detach().to(leaf.dtype).contiguous(), peer))

    def _posted(self, tensor: Tensor, peer: int) -> tuple[dist.Work, Tensor]:
        """A send under way, and what must live until it is over."""
        work = dist.isend(tensor, group=self.grid.group("pp"), group_dst=peer)
        assert work is not None
        return work, tensor


class Evaluation:
    """The model as inference has it inside the block: in evaluation mode. Its modules' own modes come back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training: list[nn.Module] = []

    def __enter__(self) -> None:
        self._training = [module for module in self._model.modules() if module.training]
        self._model.eval()

    def __exit__(self, *exception: object) -> None:
        for module in self._training:
            module.training = True
