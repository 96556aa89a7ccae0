"""Placements against every placement there is."""

from __future__ import annotations

import itertools
import random
from math import prod
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xdist.cost.place import (
    Block,
    Condition,
    Convolution,
    Halo,
    Heads,
    Neighborhood,
    Option,
    Patches,
    Placement,
    Scan,
    Spot,
)
from xdist.cost.place_attention import mixed
from xdist.plan import place_switches

Integers = NDArray[np.int64]


def drawn_block(draw: random.Random, dims: int, sizes: tuple[int, ...]) -> Block:
    """A block that can stand somewhere in a grid of `sizes`."""
    some = tuple(sorted(draw.sample(range(dims), draw.randint(1, dims))))
    heads = Heads(draw.choice((1, 2, 4)), draw.randint(1, 3))
    kinds: list[dict[str, Any]] = [
        {},
        {"whole": some[:-1]},
        {"whole": some, "heads": heads},
        {"whole": tuple(range(dims)), "heads": Heads(4, 2, key_count=draw.choice((1, 2, 4)))},
        {"reach": (Halo(draw.randint(0, 2), draw.randint(0, 3)),)},
        {"reach": (Convolution(draw.choice((1, 3, 4)), stride=draw.choice((1, 1, 2))),)},
        {"reach": (Patches(draw.choice((1, 2))),)},
        {"reach": (Scan(tuple(draw.sample(some, len(some))), 2, 1, 2, both=True),)},
        {"whole": some[:-1], "reach": (Halo(1, 1),), "condition": Condition(3, heads)},
        {"condition": Condition(draw.randint(1, 5), heads, sharded=True)},
    ]
    if min(sizes) >= 3:
        kinds.append({"reach": (Neighborhood(3),)})
    return Block(
        "drawn", draw.randint(1, 4), itemsize=draw.choice((2, 4, 8)),
        out_channels=draw.choice((None, 3)), **draw.choice(kinds),
    )  # fmt: skip


def drawn_model(seed: int) -> tuple[list[Block], tuple[int, ...], int]:
    draw = random.Random(seed)
    dims, count = draw.randint(1, 4), draw.randint(1, 8)
    if seed < 10:
        dims, count = 4, 8
    sizes = tuple(draw.randint(1, 6) for _ in range(dims))
    blocks: list[Block] = []
    grid, ways = sizes, 1
    while len(blocks) < count:
        block = drawn_block(draw, dims, grid)
        here = sum(1 for _ in ways_of(block, grid, 2))
        # So many placements fit in memory.
        if here == 0 or ways * here > 150_000:
            block = Block("free", 2)
        ways *= sum(1 for _ in ways_of(block, grid, 2))
        blocks.append(block)
        grid = block.grid(grid)
    return blocks, sizes, draw.randint(1, 4)


Way = tuple[int, tuple[Option, ...]]


def ways_of(block: Block, sizes: tuple[int, ...], degree: int) -> list[Way]:
    """Every sharded dim with every way of every need."""
    found: list[Way] = []
    for dim in range(len(sizes)):
        spot = Spot(sizes, dim, degree, 1, block.channels, block.itemsize)
        needs = [mixed(block.whole, block.heads, spot)]
        if block.condition:
            needs.append(block.condition.options(spot))
        grid = sizes
        for reach in block.reach:
            own = Spot(grid, dim, degree, 1, block.channels, block.itemsize)
            needs.append(reach.options(own))
            grid = reach.grid(grid)
        found += [(dim, chosen) for chosen in itertools.product(*needs)]
    return found


def owners(size: int, degree: int) -> Integers:
    """Who holds each position."""
    runs = np.array_split(np.arange(size), degree)
    return np.concatenate([np.full(len(run), rank) for rank, run in enumerate(runs)])


def switch_sent(sizes: tuple[int, ...], a: int, b: int, degree: int, size: int) -> list[int]:
    """Bytes each rank sends: positions that it held and another one then holds."""
    if a == b:
        return [0] * degree
    before, after = np.meshgrid(owners(sizes[a], degree), owners(sizes[b], degree), indexing="ij")
    rest = prod(sizes) // (sizes[a] * sizes[b]) * size
    return [int(((before == r) & (after != r)).sum()) * rest for r in range(degree)]


def first_and_second(
    sent: list[int], received: list[int], *, idle: int = 0, switches: int = 0
) -> tuple[int, int]:
    """What is compared, as two numbers: idle ranks and the busiest one; all bytes and switches."""
    busiest = max(a + b for a, b in zip(sent, received, strict=True))
    return (idle << 40) + busiest, sum(sent) * 64 + switches


def edge_cost(sizes: tuple[int, ...], a: int, b: int, degree: int, size: int) -> tuple[int, int]:
    there = switch_sent(sizes, a, b, degree, size)
    back = switch_sent(sizes, b, a, degree, size)
    # What backward sends, forward received.
    both = [x + y for x, y in zip(there, back, strict=True)]
    return first_and_second(both, both, switches=int(a != b))


def node_cost(block: Block, sizes: tuple[int, ...], way: Way, degree: int) -> tuple[int, int]:
    dim, chosen = way
    idle = degree - len(set(owners(block.grid(sizes)[dim], degree).tolist()))
    most = max(np.bincount(owners(sizes[dim], degree)))
    held = 2 * int(most) * prod(sizes) // sizes[dim] * block.channels * block.itemsize
    total = ((idle << 40) + held, 0)
    for option in chosen:
        sent = [one.forward.sent_bytes + one.backward.sent_bytes for one in option.moved]
        got = [one.forward.received_bytes + one.backward.received_bytes for one in option.moved]
        more = first_and_second(sent, got, idle=option.idle)
        total = (total[0] + more[0], total[1] + more[1])
    return total


def brute_force(
    blocks: list[Block], sizes: tuple[int, ...], degree: int, start: int | None, end: int | None
) -> list[tuple[int, tuple[str, ...]]]:
    """Dim and strategies of each block in the best of all placements; of equal ones the first."""
    one = two = np.zeros((1,), dtype=np.int64)
    before: list[int | None] = [start]
    ways_by_block, grid = [], sizes
    for block in blocks:
        ways, behind = ways_of(block, grid, degree), block.grid(grid)
        size = block.channels * block.itemsize
        nodes = np.array([node_cost(block, grid, way, degree) for way in ways])
        edges = np.array(
            [
                [(0, 0) if a is None else edge_cost(grid, a, b, degree, size) for b, _ in ways]
                for a in before
            ]
        )
        one = one[..., None] + edges[..., 0] + nodes[:, 0]
        two = two[..., None] + edges[..., 1] + nodes[:, 1]
        ways_by_block.append(ways)
        before, grid = [dim for dim, _ in ways], behind
    if end is not None:
        size = blocks[-1].behind * blocks[-1].itemsize
        last = np.array([edge_cost(grid, int(a or 0), end, degree, size) for a in before])
        one, two = one + last[:, 0], two + last[:, 1]
    two = np.where(one == one.min(), two, np.iinfo(np.int64).max)
    path = np.unravel_index(int(two.argmin()), two.shape)[1:]
    best = [ways[int(i)] for ways, i in zip(ways_by_block, path, strict=True)]
    return [(dim, tuple(option.strategy for option in chosen)) for dim, chosen in best]


def answered(placement: Placement) -> list[tuple[int, tuple[str, ...]]]:
    return [(one.dim, tuple(option.strategy for option in one.chosen)) for one in placement.blocks]


@pytest.mark.parametrize("seed", range(50))
def test_the_placement_is_the_best_of_all(seed: int) -> None:
    """50 drawn models of up to 4 dims and 8 blocks: every dim and strategy at every block tried."""
    blocks, sizes, degree = drawn_model(seed)
    draw = random.Random(-seed)
    start, end = (draw.choice((None, *range(len(sizes)))) for _ in range(2))
    placement = place_switches(blocks, sizes, degree, start=start, end=end)
    assert answered(placement) == brute_force(blocks, sizes, degree, start, end)
    assert sum(p.sent_bytes for p in placement.moved) == sum(
        p.received_bytes for p in placement.moved
    )
    for one in placement.blocks:
        size = one.block.channels * one.block.itemsize
        sent = [p.forward.sent_bytes for p in one.switch]
        assert sent == switch_sent(one.sizes, one.came_from, one.dim, degree, size)
