"""Pipeline: executes one stage's list of actions for one batch.

The list says the order of everything (``weft.schedule``); this room gives each kind of action its meaning. Activations
and gradients travel on process groups of their own, so transfers in opposite directions never wait for each other;
between two stages and in one direction they keep the order of the list on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from weft.capture.profile import Source
from weft.capture.recorder import Recording
from weft.errors import ModelError
from weft.plan import Plan
from weft.runtime.batches import Batch
from weft.runtime.buffers import Buffers
from weft.runtime.data import DataParallel
from weft.runtime.ending import Ending
from weft.runtime.grid import Grid
from weft.runtime.logbook import Logbook
from weft.runtime.loss import split_loss
from weft.runtime.origin import Finder
from weft.runtime.placement import Placement, Run
from weft.runtime.randomness import Seeds
from weft.runtime.routes import Routes
from weft.runtime.stopwatch import Stopwatch
from weft.schedule import Action, Edge, Kind, actions
from weft.workload import Workload


@dataclass
class Arrival:
    """A receive that has been posted: from which stage, and what."""

    peer: int
    tensors: dict[Source, Tensor]
    works: list[dist.Work]


@dataclass
class InFlight:
    """What a stage keeps of a microbatch between its forward and its backward."""

    run: Run
    loss: Tensor | None = None
    arrived: dict[Kind, list[Arrival]] = field(default_factory=dict)
    returning: dict[Source, Tensor] = field(default_factory=dict)


@dataclass
class Sums:
    """What the last stage adds up over the microbatches of a step, on its device.

    Attributes:
        loss: weighted losses; with ``counted`` the plain sum of the users' sums.
        count: sum of the users' counts, 0 where the loss is a mean.
        counted: whether the loss is ``(sum, count)``.
        unfinite: if values are checked, the number of the first call on this stage that gave a NaN or an infinity.
    """

    loss: Tensor
    count: Tensor
    counted: bool = False
    unfinite: int | None = None


class Pipeline:
    """One stage of a pipeline; a plan without one is a pipeline of one stage.

    Args:
        workload: what is computed.
        plan: how.
        grid: the ranks.
        placement: this stage's view of the model.
        data_parallel: how replicas come together.
        buffers: what forwards change.
        record: gives the recording for a microbatch, cached by its shapes.
        stopwatch: told of waiting for other stages and for replicas.
        logbook: told of every action, and of what is waited for.
        ending: of this stage's forwards.

    Attributes:
        timeout: what a tensor of another stage is waited for; None: as long as its process group waits.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        grid: Grid,
        *,
        placement: Placement,
        data_parallel: DataParallel,
        buffers: Buffers,
        record: Callable[[Any, Seeds], Recording],
        stopwatch: Stopwatch,
        logbook: Logbook,
        ending: Ending | None = None,
    ) -> None:
        self.workload, self.plan, self.grid = workload, plan, grid
        self.placement, self.data_parallel, self.record = placement, data_parallel, record
        self.buffers, self.stopwatch, self.logbook, self.ending = buffers, stopwatch, logbook, ending
        self.timeout: timedelta | None = None
        self.stage = grid.stage
        self.scale = 1.0
        """Losses are multiplied by it before the backward (``scaling``)."""
        self.bytes_sent = 0
        self._routes: WeakKeyDictionary[Recording, Routes] = WeakKeyDictionary()
        self._actions: dict[frozenset[Edge], list[Action]] = {}
        self._flights: dict[int, InFlight] = {}
        self._sends: list[tuple[dist.Work, Tensor, Action, Source]] = []

    def run(self, batch: Batch, step: int, *, check: bool = False, finder: Finder | None = None) -> Sums:
        """Forward and backward of every microbatch; gradients are left reduced over the replicas.

        Args:
            batch: this replica's part.
            step: number of the step, for the random streams.
            check: look for the first call whose output is not finite.
            finder: watches all values of forwards and backwards.

        Raises:
            ModelError: the forward depends on the data in a way that one recording cannot show.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        self._sums, self._finder = Sums(zero, zero.clone()), finder
        self._batch, self._flights = batch, {}
        self._microbatches = [self._to_device(m) for m in batch.microbatches]
        for m in range(len(self._microbatches)):
            seeds = Seeds(self.workload.seed, step, m, self.grid.replica)
            recording = self.record(batch.microbatches[m], seeds)
            checks = check or finder is not None
            self._flights[m] = InFlight(
                Run(recording, self._routes_of(recording), {}, seeds, check=checks, ending=self.ending)
            )
        self.buffers.begin(batch)
        for action in self._actions_of({edge for f in self._flights.values() for edge in f.run.routes.edges()}):
            self._perform(action)
        for work, _, action, source in self._sends:
            self._wait(work, action.kind, action.microbatch, action.peer, source)
        self._sends.clear()
        self.buffers.finish()
        return self._sums

    def _routes_of(self, recording: Recording) -> Routes:
        if recording not in self._routes:
            self._routes[recording] = Routes.find(recording, self.plan)
        return self._routes[recording]

    def _actions_of(self, edges: set[Edge]) -> list[Action]:
        """This stage's actions. The microbatches of a step may differ in what travels (a stage whose layers are all
        dropped is passed over); a transfer that one of them does not need is then empty."""
        key = frozenset(edges)
        if key not in self._actions:
            both = {(e.source, e.target) for e in edges}
            union = [Edge(s, t, Edge(s, t, True) in edges) for s, t in sorted(both)]
            lists = actions(self.plan.schedule, self.plan.pp, self.plan.microbatches, union)
            self._actions[key] = lists[self.stage]
        return self._actions[key]

    def _perform(self, action: Action) -> None:
        m = action.microbatch
        self.logbook.perform(action)
        match action.kind:
            case Kind.FORWARD:
                self._forward(action)
            case Kind.BACKWARD:
                self._backward(action)
            case Kind.RECEIVE_ACTIVATION:
                self._receive(action, self._flights[m].run.routes.received_by(self.stage).get(action.peer, ()))
            case Kind.RECEIVE_GRADIENT:
                routes = self._flights[m].run.routes
                self._receive(action, routes.with_gradient(self.stage, action.peer))
            case Kind.SEND_ACTIVATION:
                run = self._flights[m].run
                sources = run.routes.sent_by(self.stage).get(action.peer, ())
                # Autocast has other rules on an accelerator than on the CPU, where the receiver's dtype was recorded.
                tensors = [self._produced(run, s).to(run.routes.leaves[s].dtype) for s in sources]
                self._send(action, sources, tensors)
            case Kind.SEND_GRADIENT:
                flight = self._flights[m]
                routes = flight.run.routes
                wanted = routes.with_gradient(action.peer, self.stage)
                self._send(action, wanted, [flight.returning.pop(source) for source in wanted])
            case Kind.REDUCE:
                with self.stopwatch.time("communication"):
                    self.data_parallel.finish()
            case Kind.STEP:
                pass  # the engine's: it needs the norm over all ranks first

    def _forward(self, action: Action) -> None:
        m = action.microbatch
        flight = self._flights[m]
        received = self._arrived(action, Kind.RECEIVE_ACTIVATION)
        flight.run.received = {
            source: tensor.requires_grad_(flight.run.routes.leaves[source].requires_grad)
            for arrival in received
            for source, tensor in arrival.items()
        }
        with self.buffers.forward(m):
            result = self.placement.forward(self.workload.loss, self._microbatches[m], flight.run)
        self._sums.counted = flight.run.recording.counted
        self._sums.unfinite = flight.run.unfinite if self._sums.unfinite is None else self._sums.unfinite
        if self.stage == self.plan.pp - 1:
            loss, count = split_loss(result)
            flight.loss = self._weigh(loss, count, self._batch.samples[m])
            if flight.run.check and self._sums.unfinite is None and not bool(loss.isfinite()):
                self._sums.unfinite = len(flight.run.recording.calls) - 1
        if self._finder is not None:
            self._finder.after_forward(m, flight.run, self._microbatches[m], flight.loss)

    def _weigh(self, loss: Tensor, count: Tensor | float | None, samples: int) -> Tensor:
        """The loss times its share in the global batch's, and the sums that are reported."""
        weight = float(samples > 0) if count is not None else samples / self._batch.total
        self._sums.loss = self._sums.loss + loss.detach().double() * weight
        if count is not None and samples:
            self._sums.count = self._sums.count + count
        weight *= self.scale
        return loss if weight == 1.0 else loss * weight

    def _backward(self, action: Action) -> None:
        m = action.microbatch
        flight = self._flights[m]
        run = flight.run
        gradients: dict[Source, Tensor] = {}
        for arrival in self._arrived(action, Kind.RECEIVE_GRADIENT):
            for source, gradient in arrival.items():
                gradients[source] = gradients[source] + gradient if source in gradients else gradient
        roots = [self._produced(run, source) for source in gradients]
        seeds: list[Tensor | None] = list(gradients.values())
        if flight.loss is not None and flight.loss.requires_grad:
            roots.append(flight.loss)
            seeds.append(None)
        if self._finder is not None:
            self._finder.before_backward(m, run, roots)
        self.data_parallel.before_backward(last=m == self.plan.microbatches - 1)
        with self.buffers.backward(m):
            if roots:
                torch.autograd.backward(roots, seeds)
        flight.returning = {
            source: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for source, leaf in run.received.items()
            if leaf.requires_grad
        }
        run.produced.clear()
        run.received, flight.loss = {}, None

    def _produced(self, run: Run, source: Source) -> Tensor:
        name = run.recording.calls[source.call].name
        try:
            tensor, leaf = run.produced[source], run.routes.leaves[source]
            if tuple(tensor.shape) != leaf.shape:
                raise ModelError(
                    f"{name} returned a tensor of shape {tuple(tensor.shape)} where {leaf.shape} is expected, and it "
                    "goes to another stage: its shape depends on values. Give it a fixed shape (pad it), or use pp=1"
                )
            return tensor
        except KeyError:
            raise ModelError(
                f"{name} was not called in this step, or returned something else than when the model was captured, and "
                "another stage waits for its output; the forward depends on the data. Keep it on one stage, or use pp=1"
            ) from None

    def _receive(self, action: Action, sources: Sequence[Source]) -> None:
        flight = self._flights[action.microbatch]
        group = self._group(action.kind)
        arrival = Arrival(action.peer, {}, [])
        for source in sources:
            leaf = flight.run.routes.leaves[source]
            tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=self.grid.device)
            work = dist.irecv(tensor, group=group, group_src=action.peer)
            assert work is not None
            arrival.tensors[source] = tensor
            arrival.works.append(work)
        flight.arrived.setdefault(action.kind, []).append(arrival)

    def _send(self, action: Action, sources: Sequence[Source], tensors: Sequence[Tensor]) -> None:
        for source, tensor in zip(sources, tensors, strict=True):
            tensor = tensor.detach().contiguous()
            work = dist.isend(tensor, group=self._group(action.kind), group_dst=action.peer)
            assert work is not None
            self.bytes_sent += tensor.nbytes
            self._sends.append((work, tensor, action, source))  # alive until it has been sent
        self._sends = [sent for sent in self._sends if not sent[0].is_completed()]

    def _arrived(self, action: Action, kind: Kind) -> list[dict[Source, Tensor]]:
        """What was received for an action, once it is there."""
        m = action.microbatch
        arrivals = self._flights[m].arrived.pop(kind, [])
        for arrival in arrivals:
            for source, work in zip(arrival.tensors, arrival.works, strict=True):
                self._wait(work, kind, m, arrival.peer, source)
        if arrivals:
            self.logbook.perform(action)
        return [arrival.tensors for arrival in arrivals]

    def _wait(self, work: dist.Work, kind: Kind, m: int, peer: int, source: Source) -> None:
        self.logbook.wait(kind, m, peer, self._flights[m].run.recording.calls[source.call].name)
        with self.stopwatch.time("waiting"):
            if self.timeout is None:
                work.wait()
            else:
                work.wait(self.timeout)

    def _to_device(self, batch: Any) -> Any:
        device = self.grid.device
        return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)

    def _group(self, kind: Kind) -> dist.ProcessGroup:
        if kind in (Kind.SEND_ACTIVATION, Kind.RECEIVE_ACTIVATION):
            return self.grid.group("pp")
        assert self.grid.gradients is not None
        return self.grid.gradients
