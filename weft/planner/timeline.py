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

from weft.planner.program import Program, compiled, follow
from weft.planner.sharing import Sharing
from weft.planner.work import Event, Spent, Stage
from weft.schedule import Action

FILLED = {8: (8, 2), 16: (4, 1)}
LONG_FILLED = 2, 1
"""Rounds of devices after which a pipeline does the same again, and after how many more, by the devices up to which
that holds; of a longer one, whose rounds take long to simulate and matter less."""


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
        return follow(compiled(actions), stages, transfer_s, events)
    together = Sharing(actions, [(stages, transfer_s)], dict.fromkeys((stage.node for stage in stages), cores))
    (spent,) = together.run()
    if events is not None:
        events += together.events[0]
    return spent


def repeated(
    programs: Callable[[int], Program],
    microbatches: int,
    stages: Sequence[Stage],
    transfer_s: Mapping[tuple[int, int], float],
    devices: int,
) -> list[Spent]:
    """``simulate`` of many microbatches where no device slows another. A pipeline that has filled does the same again
    for every ``devices`` microbatches, or for every two times as many, so two short runs tell what each of the other
    rounds adds.

    Args:
        programs: the schedule with any number of microbatches.
        microbatches: how many there are.
        stages, transfer_s: as for ``simulate``.
        devices: of the pipeline.
    """
    filled, more = next((each for most, each in FILLED.items() if devices <= most), LONG_FILLED)
    short = filled * devices + microbatches % devices
    if microbatches <= short + more * devices:
        return follow(programs(microbatches), stages, transfer_s)
    runs = [follow(programs(count), stages, transfer_s) for count in (short, short + more * devices)]
    rounds = (microbatches - short) / (more * devices)

    def longer(one: Spent, two: Spent) -> Spent:
        return Spent(*(a + rounds * (b - a) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))

    return [longer(one, two) for one, two in zip(*runs, strict=True)]
