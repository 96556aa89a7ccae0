"""Bytes that torch's fully_shard moves, as formulas; no torch, no process group.

Every parameter is cut by rows into R shares of ceil(rows / R); the last ones may be short or empty
and travel padded. A unit is what is gathered and reduced together: a block, or the rest of the
model. With w its padded share in bytes and R ranks, each rank sends, and receives, in a micro-step

    gather before forward            (R - 1) w
    gather again before backward     (R - 1) w    blocks only, with reshard
    reduce-scatter after backward    (R - 1) g    g: the share of its trained parameters

The rest of the model stays gathered between forward and backward: its backward comes first.
An evaluation gathers everything once. Clipping adds the reduce of one float64 number a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from xdist.cost.moves import Moved


@dataclass(frozen=True)
class Held:
    """A parameter of a unit: its whole shape, whether it learns, bytes an element."""

    shape: tuple[int, ...]
    trained: bool = True
    itemsize: int = 4


def rows_of_rank(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """First row and the one after the last of a rank's share of `rows` rows."""
    each = -(-rows // ranks)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def share_elements(shape: Sequence[int], ranks: int) -> int:
    """Elements of a rank's share, padding included, of a parameter of at least one dim."""
    return -(-shape[0] // ranks) * prod(shape[1:])


def unit_gather(unit: Sequence[Held], ranks: int) -> Moved:
    """What each rank moves when the unit's parameters are gathered once."""
    share = sum(share_elements(held.shape, ranks) * held.itemsize for held in unit)
    return Moved((ranks - 1) * share, (ranks - 1) * share)


def unit_reduce_scatter(unit: Sequence[Held], ranks: int) -> Moved:
    """What each rank moves when the unit's gradients are summed, each rank keeping its share."""
    return unit_gather([held for held in unit if held.trained], ranks)


def micro_step(
    blocks: Sequence[Sequence[Held]], rest: Sequence[Held], ranks: int, *, reshard: bool
) -> Moved:
    """What each rank moves in one forward and backward pass."""
    moved = unit_gather(rest, ranks) + unit_reduce_scatter(rest, ranks)
    for block in blocks:
        moved += unit_gather(block, ranks) + unit_reduce_scatter(block, ranks)
        # A block without a trained parameter has nothing to compute again.
        if reshard:
            moved += unit_gather(block, ranks)
    return moved


def evaluation(blocks: Sequence[Sequence[Held]], rest: Sequence[Held], ranks: int) -> Moved:
    """What each rank moves in one forward pass without gradients, with or without reshard."""
    moved = unit_gather(rest, ranks)
    for block in blocks:
        moved += unit_gather(block, ranks)
    return moved
