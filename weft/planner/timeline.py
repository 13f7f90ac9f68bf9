"""Simulates a schedule: the very lists of actions that the runtime executes, with the time each one takes.

One representative device stands for each stage. An action computes for ``compute_s`` on a device alone, then
communicates for ``collective_s`` with the stage's other devices. Transfers between stages are asynchronous: one begins
when both ends have posted it and the pair's previous one in that direction has arrived.

Devices that share processor cores slow each other: of ``A`` devices of a node that are busy at once, each computes at
``min(1, cores / A)`` of its speed; what a quota keeps one from taking is left to the others (``sharing.level``).
Communication counts as busy, but is not slowed: its rates were measured with all at work.

A step's time is the end of the last stage, and for each stage

    end = compute + collectives + reduce + step + transfer + bubble

where waiting for a tensor is ``transfer`` while that tensor travels and ``bubble`` before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from weft.planner.sharing import Sharing
from weft.planner.work import Event, Key, Spent, Stage, arriving, needs, transfer_of
from weft.schedule import Action

FILLED = 4
"""Rounds of a pipeline's devices after which it does the same in every round."""


def simulate(
    actions: Sequence[Sequence[Action]],
    stages: Sequence[Stage],
    transfer_s: Mapping[tuple[int, int], float],
    cores: float | None = None,
    events: list[Event] | None = None,
) -> list[Spent]:
    """Run the lists of actions.

    Args:
        actions: one list per device, as ``schedule.actions`` makes them.
        stages: costs of all stages; stage ``k`` is on device ``k % len(actions)``.
        transfer_s: seconds one microbatch's tensors take from a stage to another, by (source, target).
        cores: devices of a node that compute at full speed at once; None: all.
        events: where to note every action that takes time, and the receives that a device waits for while they travel.

    Returns:
        Per device what its time went to.
    """
    if cores is None:
        return _independent(actions, stages, transfer_s, events)
    run = Sharing(actions, [(stages, transfer_s)], dict.fromkeys((stage.node for stage in stages), cores))
    (spent,) = run.run()
    if events is not None:
        events += run.events[0]
    return spent


def repeated(
    lists: Callable[[int], Sequence[Sequence[Action]]],
    microbatches: int,
    stages: Sequence[Stage],
    transfer_s: Mapping[tuple[int, int], float],
    devices: int,
) -> list[Spent]:
    """``simulate`` of many microbatches where no device slows another. A pipeline that has filled does the same again
    for every ``devices`` microbatches, so two short runs tell what each of the other rounds adds.

    Args:
        lists: the actions for any number of microbatches.
        microbatches: how many there are.
        stages, transfer_s: as for ``simulate``.
        devices: of the pipeline.
    """
    short = FILLED * devices + microbatches % devices
    if microbatches <= short + devices:
        return simulate(lists(microbatches), stages, transfer_s)
    runs = [simulate(lists(count), stages, transfer_s) for count in (short, short + devices)]
    rounds = (microbatches - short) / devices

    def longer(one: Spent, two: Spent) -> Spent:
        return Spent(*(a + rounds * (b - a) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))

    return [longer(one, two) for one, two in zip(*runs, strict=True)]


def _independent(
    actions: Sequence[Sequence[Action]],
    stages: Sequence[Stage],
    transfer_s: Mapping[tuple[int, int], float],
    events: list[Event] | None,
) -> list[Spent]:
    """The same where no device slows another: each is followed on its own as far as what it waits for is known, so the
    work grows with the actions alone.

    Transfers of a pair follow each other in one order, which is that of both ends' lists.
    """
    devices = len(actions)
    waits = [needs(own, device, devices) for device, own in enumerate(actions)]
    posted: dict[Key, float] = {}
    travels: dict[Key, tuple[float, float]] = {}
    free: dict[tuple[int, int], float] = {}
    now, place = [0.0] * devices, [0] * devices
    spent = [Spent() for _ in actions]
    moved = True
    while moved:
        moved = False
        for device, own in enumerate(actions):
            while place[device] < len(own):
                action = own[place[device]]
                if action.peer >= 0:
                    key = transfer_of(action, device, devices)
                    if key in posted:
                        pair = (key.source % devices, key.target % devices)
                        begin = max(now[device], posted[key], free.get(pair, 0.0))
                        free[pair] = begin + transfer_s[key.source, key.target]
                        travels[key] = begin, free[pair]
                    else:
                        posted[key] = now[device]
                else:
                    needed = waits[device].get((action.kind, action.microbatch, action.chunk), [])
                    if any(key not in travels for key in needed):
                        break
                    if needed:
                        before = spent[device].transfer_s
                        now[device] = spent[device].wait(now[device], [travels[key] for key in needed])
                        travelled = spent[device].transfer_s - before
                        if events is not None and travelled > 0:
                            events.append(Event(device, arriving(action), now[device] - travelled, now[device]))
                    work = stages[device + action.chunk * devices].work(action.kind)
                    spent[device].work(action.kind, *work)
                    end = now[device] + work.compute_s + work.collective_s + work.sending_s
                    if events is not None:
                        events.append(Event(device, action, now[device], end))
                    now[device] = end
                place[device] += 1
                moved = True
    assert all(p == len(own) for p, own in zip(place, actions, strict=True)), "the schedule is stuck"
    for device, end in enumerate(now):
        spent[device].end_s = end
    return spent
