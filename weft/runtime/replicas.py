"""Replicas: whether copies that should be equal still are, by a checksum of their bits.

Many ranks hold the same elements: whole copies along ``dp_replicate``, along ``dp_shard`` and ``tp`` what these do not
divide, on several stages tied weights. They begin equal and are changed alike, so they stay equal to the last bit. A
fault of memory or of a link, code that does something else on one rank, an optimizer that draws random numbers: each
makes them part without a sign, and what is trained is then no one model.

The checksum of a tensor is a sum over its bits as whole 64-bit words, modulo 2**64::

    sum_ij (a_j + b_i) x_ij        rows of W words; from the sums of all rows and of all columns

The weights are scattered over all 64 bits, a_j odd and b_i even. So any change of one word is found for certain; words
in each other's places and other changes pass with odds of about 2**-64 if nobody contrives them. Each rank adds what it
holds, and all get everyone's few numbers in one all-gather; names are asked for only where these differ.

Found: parameters, trained or frozen, and buffers that differ between ranks at the moment of the check. Not found: what
is wrong on all copies alike, or where there is one copy only (a shard without replicas); optimizer state, until it has
moved a parameter; anything else a rank keeps. On accelerators copies along ``tp`` are compared only under
``torch.use_deterministic_algorithms``: each of those ranks computes their gradients by itself, and kernels that add in
any order need not give the same bits twice.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from weft.errors import ReplicaError
from weft.plan import DIMENSIONS
from weft.runtime.dtensor import cuts, local
from weft.runtime.grid import Grid
from weft.runtime.part import Part

WIDTH = 2**12
"""Words in a row."""
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
DIVIDED = ("dp_shard", "tp")
"""Dimensions that may divide a tensor."""
CLASSES = list(itertools.product((False, True), repeat=len(DIVIDED)))
"""Of tensors: along which of them they are divided."""


class Kept(NamedTuple):
    """A tensor this rank holds.

    Attributes:
        name: its first single-device name.
        values: this rank's piece.
        stages: that hold it.
        divided: along which of DIVIDED other ranks hold other elements of it.
    """

    name: str
    values: Tensor
    stages: tuple[int, ...]
    divided: tuple[bool, ...]


def check(part: Part, grid: Grid, step: int) -> None:
    """Compare all copies; all ranks call it.

    Args:
        part: what this rank holds.
        grid: the ranks.
        step: steps done, for the message.

    Raises:
        ReplicaError: on every rank: some are no longer equal.
    """
    if grid.mesh.size() == 1:
        return
    kept = kept_in(part)
    weights = weights_for(max((each.values.nbytes for each in kept), default=0), grid.device)
    sums = [checksum(each.values, weights) for each in kept]
    shared = sorted({stages for stages in part.stages.values() if len(stages) > 1})
    totals = torch.zeros(1 + len(shared), len(CLASSES), dtype=torch.int64, device=grid.device)
    for each, total in zip(kept, sums, strict=True):
        row = 1 + shared.index(each.stages) if len(each.stages) > 1 else 0
        totals[row, column_of(each.divided)] += total * weight_of(each.name)
    every = totals.new_empty(grid.mesh.size(), *totals.shape)
    dist.all_gather(list(every.unbind()), totals)
    if differ(every, shared, grid):
        raise name_first(kept, [int(total) for total in sums], grid, step)


def kept_in(part: Part) -> list[Kept]:
    """What a rank holds: parameters in the model's order, then buffers."""
    tensors = [(held.name, held.parameter.detach()) for held in part.held] + list(part.buffers.items())
    return [
        Kept(name, local(tensor), part.stages[name], (is_sharded(tensor), name in part.divisions))
        for name, tensor in tensors
    ]


def is_sharded(tensor: Tensor) -> bool:
    """Whether fully_shard has cut it."""
    return bool(cuts(tensor))


def checksum(tensor: Tensor, weights: Tensor) -> Tensor:
    """The checksum of a tensor's bits, a scalar of int64 on its device; 0 of an empty tensor.

    Args:
        tensor: of any dtype.
        weights: a and b, from ``weights_for`` tensors of this size or larger.
    """
    words = words_of(tensor)
    of_columns, of_rows = weights
    rows = len(words) // WIDTH
    rest = words[rows * WIDTH :]
    total: Tensor = (rest * of_columns[: len(rest)]).sum()
    if rows:
        body = words[: rows * WIDTH].view(rows, WIDTH)
        total = total + (body.sum(0) * of_columns[:WIDTH]).sum() + (body.sum(1) * of_rows[:rows]).sum()
    return total


def weights_for(largest: int, device: torch.device) -> Tensor:
    """Weights for tensors of up to so many bytes: [2, length], the first odd, the second even.

    Scattered by the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    length = max(WIDTH, 1 + largest // (8 * WIDTH))
    mixed = torch.arange(1, 2 * length + 1, dtype=torch.int64, device=device) * GOLDEN
    for shift, factor in MIXING:
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed = mixed.view(2, length)
    return torch.stack([mixed[0] | 1, mixed[1] & -2])


def words_of(tensor: Tensor) -> Tensor:
    """A tensor's bits as int64 words; bytes that fill none up are a word each."""
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous().view(-1)
    each = 8 // min(8, values.itemsize)
    if values.storage_offset() % each:
        values = values.clone()
    whole = values.numel() // each * each
    words = values[:whole].view(torch.int64)
    if whole == values.numel():
        return words
    return torch.cat([words, values[whole:].view(torch.uint8).to(torch.int64)])


def weight_of(name: str) -> int:
    """An odd number that depends on a name alone."""
    return 2 * zlib.crc32(name.encode()) + 1


def column_of(divided: tuple[bool, ...]) -> int:
    """The place of a class of tensors in ``Kept.divided``'s terms."""
    return sum(flag << place for place, flag in enumerate(divided))


def copied(divided: tuple[bool, ...], grid: Grid) -> list[str]:
    """The dimensions along which ranks hold the same elements and are compared."""
    whole = [name for name, flag in zip(DIVIDED, divided, strict=True) if not flag]
    if grid.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        whole = [name for name in whole if name != "tp"]
    return ["dp_replicate", "cp", *whole]


def differ(every: Tensor, shared: list[tuple[int, ...]], grid: Grid) -> bool:
    """Whether any rank's totals, [ranks, 1 + shared, classes], are not those of the first that holds the same."""
    grids = every.view(*(grid.degree(name) for name in DIMENSIONS), *every.shape[1:])
    found = []
    for divided in CLASSES:
        for row, stages in enumerate([None, *shared]):
            totals = grids[..., row, column_of(divided)]
            first = totals if stages is None else totals[stages[0] : stages[0] + 1]
            totals = totals if stages is None else totals[list(stages)]
            for name in copied(divided, grid):
                first = first.narrow(DIMENSIONS.index(name), 0, 1)
            found.append((totals != first).any())
    return bool(torch.stack(found).any())


def name_first(kept: list[Kept], sums: list[int], grid: Grid, step: int) -> ReplicaError:
    """The error of copies that are not equal; all ranks call it and get the same."""
    every: list[Any] = [None] * grid.mesh.size()
    dist.all_gather_object(every, [(each.name, each.divided, total) for each, total in zip(kept, sums, strict=True)])
    copies: dict[tuple[str, tuple[int, ...]], dict[int, list[int]]] = {}
    for rank, told in enumerate(every):
        place = dict(zip(DIMENSIONS, (grid.mesh.mesh == rank).nonzero()[0].tolist(), strict=True))
        for name, divided, total in told:
            same = copied(divided, grid)
            key = name, tuple(place[d] for d in DIMENSIONS[1:] if d not in same)
            copies.setdefault(key, {}).setdefault(total, []).append(rank)
    different = {key: by_sum for key, by_sum in copies.items() if len(by_sum) > 1}
    (name, _), by_sum = next(iter(different.items()))
    ranks = tuple(sorted(map(tuple, by_sum.values()), key=lambda alike: (-len(alike), alike)))
    more = len({name for name, _ in different}) - 1
    others = f"; nor are those of {more} other tensors" if more else ""
    return ReplicaError(
        f"after step {step} copies of {name} are not equal: {' | '.join(said(alike) for alike in ranks)}{others}. A "
        "device or a link is at fault, or code that does something else on one rank; go on from a checkpoint of before",
        step=step,
        name=name,
        ranks=ranks,
    )


def said(ranks: tuple[int, ...]) -> str:
    """Some ranks, in words."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
