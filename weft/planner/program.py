"""A schedule made ready to be simulated: all devices' actions in one order in which whatever an action waits for comes
before it. The order does not depend on how long actions take, so a program serves every plan with the same schedule.

Transfers of a pair of devices follow each other in one order, which is that of both ends' lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from weft.planner.work import LATER, Event, Spent, Stage, arriving, last_of
from weft.schedule import Action, Edge, Kind, actions

WORKS = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT, Kind.REDUCE, Kind.STEP)

PROGRAMS_KEPT = 32


Step = tuple[int, int, int, int, tuple[int, ...] | None, Action | None]
"""``(device, what, way, pair, after, action)``, of which long pipelines have hundreds of thousands. ``what`` is a
transfer that a device posts its end of, or the number of a work (``action``) that it does once the transfers in
``after`` have arrived. ``way`` and ``pair`` are those of a transfer whose other end is posted already, ``way`` is -1 of
others."""

Ready = tuple[int, int, tuple[int, ...] | None, Action | None]
"""``(what, way, after, action)`` of a device; ``way`` is -1 of works."""

FORWARD, BACKWARD, SEND_ACTIVATION, SEND_GRADIENT, RECEIVE_ACTIVATION = (
    Kind.FORWARD,
    Kind.BACKWARD,
    Kind.SEND_ACTIVATION,
    Kind.SEND_GRADIENT,
    Kind.RECEIVE_ACTIVATION,
)


@dataclass
class Program:
    """What devices do, in order.

    Attributes:
        devices: how many.
        steps: of all devices.
        ways: source and target stage of every direction in which tensors travel.
        transfers, pairs: how many.
        works: how often each device does each work; a work's number is its stage's times the number of WORKS, and its
            place among them.
    """

    devices: int
    steps: list[Step] = field(default_factory=list)
    ways: list[tuple[int, int]] = field(default_factory=list)
    transfers: int = 0
    pairs: int = 0
    works: list[Counter[int]] = field(default_factory=list)


def compiled(lists: Sequence[Sequence[Action]]) -> Program:
    """The program of some lists of actions, one per device."""
    devices = len(lists)
    microbatches = 1 + max((action.microbatch for own in lists for action in own), default=0)
    ways: dict[tuple[int, int], int] = {}
    queues = [_ready(own, device, devices, microbatches, ways) for device, own in enumerate(lists)]
    works = [Counter([what for what, way, _, _ in queue if way < 0]) for queue in queues]
    transfers, pairs = len(ways) * microbatches, dict[tuple[int, int], int]()
    pair_of = [pairs.setdefault((source % devices, target % devices), len(pairs)) for source, target in ways]
    program = Program(devices, [], list(ways), transfers, len(pairs), works)
    posted, travels = [False] * transfers, [False] * transfers
    places, add, moved = [0] * devices, program.steps.append, True
    while moved:
        moved = False
        for device, queue in enumerate(queues):
            first = place = places[device]
            while place < len(queue):
                what, way, after, action = queue[place]
                if after is not None:
                    if after and not all([travels[number] for number in after]):
                        break
                    add((device, what, -1, -1, after, action))
                elif posted[what]:
                    travels[what] = True
                    add((device, what, way, pair_of[way], None, None))
                else:
                    posted[what] = True
                    add((device, what, -1, -1, None, None))
                place += 1
            places[device] = place
            moved = moved or place > first
    assert places == [len(queue) for queue in queues], "the schedule is stuck"
    return program


def _ready(
    actions: Sequence[Action], device: int, devices: int, microbatches: int, ways: dict[tuple[int, int], int]
) -> list[Ready]:
    """A device's actions in order. ``ways`` gives a number to every direction; a transfer's is that of its way and its
    microbatch."""
    found: list[Ready] = []
    awaited: dict[tuple[bool, int, int], tuple[int, ...]] = {}
    add = found.append
    for action in actions:
        kind, microbatch, peer, chunk = action
        stage = device + chunk * devices
        if peer < 0:
            after: tuple[int, ...] = ()
            if kind is FORWARD or kind is BACKWARD:
                after = awaited.pop((kind is FORWARD, microbatch, chunk), ())
            add((stage * len(WORKS) + WORKS.index(kind), -1, after, action))
        elif kind is SEND_ACTIVATION or kind is SEND_GRADIENT:
            way = ways.setdefault((stage, peer), len(ways))
            add((way * microbatches + microbatch, way, None, None))
        else:
            way = ways.setdefault((peer, stage), len(ways))
            number = way * microbatches + microbatch
            key = kind is RECEIVE_ACTIVATION, microbatch, chunk
            awaited[key] = (*awaited[key], number) if key in awaited else (number,)
            add((number, way, None, None))
    return found


@lru_cache(maxsize=PROGRAMS_KEPT)
def of_schedule(schedule: str, devices: int, microbatches: int, edges: frozenset[Edge], chunks: int = 1) -> Program:
    """The program of a schedule; arguments as of ``schedule.actions``."""
    return compiled(actions(schedule, devices, microbatches, edges, chunks))


def follow(
    program: Program,
    stages: Sequence[Stage],
    transfer_s: Mapping[tuple[int, int], float],
    events: list[Event] | None = None,
) -> list[Spent]:
    """What each device's time goes to, where none slows another. Arguments as of ``timeline.simulate``."""
    works = [stage.work(kind) for stage in stages for kind in WORKS]
    takes, travel_s = [sum(work) for work in works], [transfer_s[way] for way in program.ways]
    begins, ends = [0.0] * program.transfers, [0.0] * program.transfers
    now, free = [0.0] * program.devices, [0.0] * program.pairs
    travelling, waiting = [0.0] * program.devices, [0.0] * program.devices
    for device, what, way, pair, after, action in program.steps:
        since = now[device]
        if after is None:
            if way < 0:
                begins[what] = since
                continue
            begin = max(since, begins[what], free[pair])
            begins[what] = begin
            ends[what] = free[pair] = begin + travel_s[way]
            continue
        if after:
            begin, arrival = begins[after[0]], ends[after[0]]
            if len(after) > 1:
                begin, arrival = last_of((begins[i], ends[i]) for i in after)
            if arrival > since * LATER:
                travelled = arrival - max(begin, since)
                travelling[device] += travelled
                waiting[device] += arrival - since - travelled
                if events is not None and travelled > 0 and action is not None:
                    events.append(Event(device, arriving(action), arrival - travelled, arrival))
                since = arrival
        now[device] = since + takes[what]
        if events is not None and action is not None:
            events.append(Event(device, action, since, now[device]))
    found = []
    for device, counts in enumerate(program.works):
        spent = Spent(transfer_s=travelling[device], bubble_s=waiting[device], end_s=now[device])
        for what, count in counts.items():
            spent.work(WORKS[what % len(WORKS)], *(count * seconds for seconds in works[what]))
        found.append(spent)
    return found
