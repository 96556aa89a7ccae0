"""Where switches are placed: against every placement there is, ties, idle ranks, bad blocks."""

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
    Unpatches,
)
from xdist.cost.place_attention import mixed
from xdist.errors import ConfigError, LayoutError, ShapeError, StrategyError
from xdist.plan import place_switches

Integers = NDArray[np.int64]

# --- against brute force ------------------------------------------------------------------------


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


# --- what it chooses ----------------------------------------------------------------------------

EIGHT = Heads(8, 8)


def layers(count: int) -> list[Block]:
    pair = [
        Block("spatial", 64, whole=(1, 2), heads=EIGHT),
        Block("mlp", 64),
        Block("temporal", 64, whole=(0,), heads=EIGHT),
        Block("mlp", 64),
    ]
    return pair * count


def test_spatial_and_temporal_blocks_are_placed_as_dsp() -> None:
    """Two switches a layer, 2 (M/P)(P-1)/P elements, nothing inside the blocks."""
    placed = place_switches(layers(3), (8, 16, 16), 4, start=0, end=0)
    by_name: dict[str, set[int]] = {}
    for one in placed.blocks:
        by_name.setdefault(one.block.name, set()).add(one.dim)
    assert by_name["spatial"] == {0}
    assert by_name["temporal"] == {1}
    assert placed.switches == 6
    elements = 8 * 16 * 16 * 64
    for passes in placed.moved:
        assert passes.forward.received_bytes == 3 * 4 * 2 * (elements // 4) * 3 // 4
        assert passes == placed.switched[0]
    assert set(placed.strategies) == {""}


def test_equal_placements_keep_the_lower_dim() -> None:
    """The stated rule: fewer switches, then the lower dim at the first block that differs."""
    free = place_switches([Block("mlp", 4)] * 3, (4, 4, 4), 2)
    assert free.dims == (0, 0, 0)
    assert free.switches == 0
    # Height and width serve alike: height it is.
    frames = place_switches([Block("temporal", 4, whole=(0,))], (4, 4, 4), 2)
    assert (frames.start, frames.dims, frames.end) == (1, (1,), 1)
    # A switch costs the same in front of the MLP and behind it: the lower dim stays.
    model = [Block("a", 4, whole=(1, 2)), Block("mlp", 4), Block("b", 4, whole=(0,))]
    assert place_switches(model, (4, 4, 4), 2).dims == (0, 0, 1)
    # The narrow place to switch beats the lower dim.
    model[1] = Block("mlp", 3)
    assert place_switches(model, (4, 4, 4), 2).dims == (0, 1, 1)


@pytest.mark.parametrize(
    ("heads", "said"),
    [(Heads(8, 8), "ulysses"), (Heads(8, 8, key_count=1), "ring"), (Heads(2, 32), "ring")],
    ids=["many heads", "one key head", "fewer heads than ranks"],
)
def test_full_blocks_become_ulysses_or_ring(heads: Heads, said: str) -> None:
    """Of the flattened tokens: by bytes, and no rank is left without a head."""
    full = Block("full", 64, whole=(0, 1, 2), heads=heads)
    placed = place_switches([full], (8, 6, 5), 4)
    assert placed.strategies == (said,)
    assert placed.switches == 0
    assert said in placed.table()
    assert "needs dims 0, 1, 2 whole" in placed.why[0]


def test_a_condition_costs_nothing_where_every_rank_holds_it() -> None:
    whole = Block("cross", 16, condition=Condition(7, Heads(4, 4)))
    placed = place_switches([whole], (8, 6), 4)
    assert all(passes.bytes == 0 for passes in placed.moved)
    cut = Block("cross", 16, condition=Condition(7, Heads(4, 4), sharded=True))
    placed = place_switches([cut], (8, 6), 4)
    # Short: every rank receives the other ranks' keys and values, float32, once.
    shares = (2, 2, 2, 1)
    assert placed.blocks[0].cross_strategy == "gather"
    for passes, own in zip(placed.moved, shares, strict=True):
        assert passes.forward.received_bytes == (7 - own) * 2 * 16 * 4


def test_long_conditions_go_to_heads() -> None:
    """Where keys outweigh queries many times over, both are switched to heads."""
    cross = Condition(4096, Heads(8, 8), sharded=True)
    placed = place_switches([Block("cross", 64, condition=cross)], (2, 4), 2)
    assert placed.blocks[0].cross_strategy == "ulysses"


def test_stages_shrink_the_grid_and_grow_it() -> None:
    """Switches, edges and shares are those of each stage's own grid."""
    blocks = [
        Block("embed", 2, reach=(Patches((1, 2, 2)),)),
        Block("spatial", 8, whole=(1, 2)),
        Block("down", 8, reach=(Convolution((2, 3, 3), stride=(2, 2, 2)),)),
        Block("temporal", 16, whole=(0,)),
        Block("up", 16, reach=(Unpatches((2, 4, 4), (7, 15, 14)),)),
    ]
    placed = place_switches(blocks, (7, 15, 14), 2, start=0, end=0)
    assert [one.sizes for one in placed.blocks] == [
        (7, 15, 14), (7, 8, 7), (7, 8, 7), (4, 4, 4), (4, 4, 4),
    ]  # fmt: skip
    assert placed.out_sizes == (7, 15, 14)
    # The one switch there is to place happens on the smallest grid, and one back.
    assert placed.dims[3] != 0
    assert placed.switches == 2


def test_ranks_without_tokens_are_the_last_resort() -> None:
    """Three frames on four ranks: space is sharded, though that moves bytes."""
    spatial = Block("spatial", 16, whole=(1, 2), heads=Heads(4, 4))
    placed = place_switches([spatial], (3, 8, 8), 4, start=0, end=0)
    assert placed.dims == (1,)
    assert placed.strategies == ("ulysses",)
    assert "dim 0 leaves 1 more ranks idle" in placed.why[0]
    # Without heads nothing else can be.
    alone = place_switches([Block("spatial", 16, whole=(1, 2))], (3, 8, 8), 4)
    assert alone.dims == (0,)
    assert "1 idle rank(s)" in alone.why[0]
    # A dim of one position would need no switch at all, with everything on one rank.
    single = place_switches(layers(1), (1, 8, 8), 2)
    assert 0 not in single.dims


def test_even_shares_are_worth_a_few_bytes() -> None:
    """A third position on one of two ranks would move less, as it has less to send."""
    blocks = [Block("temporal", 4, whole=(0,))]
    placed = place_switches(blocks, (8, 5, 3), 2, start=0)
    assert placed.dims == (1,)
    assert switch_sent((8, 5, 3), 0, 1, 2, 16) > switch_sent((8, 5, 3), 0, 2, 2, 16)
    # A long run of free blocks leaves a dim that one rank holds twice as much of.
    run = [Block("mlp", 4)] * 8
    assert place_switches(run, (5, 8), 4, start=0).dims == (1,) * 8
    assert place_switches(run[:1], (5, 8), 4, start=0).dims == (0,)


def test_scans_cross_ranks_by_states_or_lie_in_rows() -> None:
    """Rules R1 and R2: outside the order nothing moves; along the outermost dim states do."""
    rows = Block("rows", 8, reach=(Scan((1,), 8, 4, 1),))
    placed = place_switches([rows], (16, 16, 16), 4, start=1)
    assert placed.blocks[0].inside[0].bytes == 0
    assert (placed.dims, placed.switches) == ((0,), 1)
    raster = Block("raster", 8, reach=(Scan((0, 1, 2), 2, 4, 4, both=True),))
    short, long = (place_switches([raster], (n, 16, 16), 4).moved for n in (16, 64))
    assert short == long
    assert short[0].bytes > 0


def test_one_rank_and_the_batch() -> None:
    """One rank needs no switch; the batch scales the bytes and changes nothing else."""
    alone = place_switches(layers(2), (4, 4, 4), 1, start=2, end=2)
    assert alone.switches == 0
    assert set(alone.dims) == {2}
    one, three = (place_switches(layers(2), (5, 7, 3), 3, batch=b, start=0) for b in (1, 3))
    assert one.dims == three.dims
    for a, b in zip(one.moved, three.moved, strict=True):
        assert 3 * a.sent_bytes == b.sent_bytes


def test_the_ends_are_where_they_are_asked_for() -> None:
    blocks = [Block("temporal", 4, whole=(0,))]
    placed = place_switches(blocks, (4, 4, 4), 2, start=0, end=2)
    assert placed.blocks[0].came_from == 0
    assert (placed.dims, placed.switches) == ((2,), 1)
    placed = place_switches(blocks, (4, 4, 4), 2, start=0, end=0)
    assert placed.switches == 2
    assert placed.back[0].forward.sent_bytes == 4**4 * 4 // 4
    assert "behind: dim 1 to 0" in placed.table()


def test_the_table_has_each_different_line_once() -> None:
    table = place_switches(layers(12), (8, 16, 16), 4, start=0, end=0).table()
    assert "48 block(s), 24 switch(es)" in table
    assert len(table.splitlines()) < 10
    assert "needs dims 1, 2 whole" in table


def keys_of(query: int, size: int, window: int, dilation: int) -> list[int]:
    """Hassani and Shi: the nearest keys of the query's residue class, pushed inside."""
    own = list(range(query % dilation, size, dilation))
    place = own.index(query)
    first = min(max(place - window // 2, 0), len(own) - window)
    return own[first : first + window]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("size", "degree"), [(15, 4), (16, 3), (17, 2)])
def test_a_neighborhood_fetches_the_run_between_its_outer_keys(
    size: int, degree: int, dilation: int
) -> None:
    reach = Neighborhood(5, dilation)
    spot = Spot((size, 15), 0, degree, 2, 3, 4)
    assert reach.grid((size, 15)) == (size, 15)
    (option,) = reach.options(spot)
    held = owners(size, degree)
    for rank, passes in enumerate(option.moved):
        mine = np.flatnonzero(held == rank).tolist()
        keys = {key for query in mine for key in keys_of(query, size, 5, dilation)}
        run = range(min(keys), max(keys) + 1)
        away = sum(held[key] != rank for key in run)
        assert passes.forward.received_bytes == away * 15 * 2 * (2 * 3) * 4


# --- bad placements -----------------------------------------------------------------------------

BAD = (
    ("no blocks", lambda: place_switches([], (4, 4), 2), ConfigError, "at least one block"),
    ("no grid", lambda: place_switches([Block("a", 4)], (), 2), LayoutError, "at least one dim"),
    ("empty dim", lambda: place_switches([Block("a", 4)], (4, 0), 2), LayoutError, r"\(4, 0\)"),
    ("degree", lambda: place_switches([Block("a", 4)], (4,), 0), ShapeError, "degree"),
    ("batch", lambda: place_switches([Block("a", 4)], (4,), 2, batch=0), ShapeError, "batch"),
    ("start", lambda: place_switches([Block("a", 4)], (4, 4), 2, start=2), LayoutError, "start=2"),
    ("end", lambda: place_switches([Block("a", 4)], (4, 4), 2, end=-1), LayoutError, "end=-1"),
    (
        "no such dim",
        lambda: place_switches([Block("b", 4, whole=(3,))], (4, 4, 4), 2),
        LayoutError, r"block 'b' needs the dims \(3,\) whole",
    ),
    (
        "full without heads",
        lambda: place_switches([Block("f", 4, whole=(0, 1))], (4, 4), 2),
        StrategyError, "block 'f' can stand nowhere",
    ),
    ("channels", lambda: Block("c", 0), ShapeError, "channels of block 'c'"),
    ("itemsize", lambda: Block("c", 4, itemsize=3), ConfigError, "itemsize of block 'c' is 3"),
    ("twice", lambda: Block("c", 4, whole=(1, 1)), ConfigError, "twice"),
    ("key heads", lambda: Heads(6, 4, key_count=4), ShapeError, "6 and 4"),
    ("condition", lambda: Condition(0, Heads(1, 1)), ShapeError, "tokens"),
    ("kernel", lambda: Convolution(0), ShapeError, "kernel must be at least 1"),
    ("floats", lambda: Halo(1.5, 1), ShapeError, "must be an int"),  # type: ignore[arg-type]
    (
        "kernel dims",
        lambda: place_switches([Block("c", 4, reach=(Convolution((3, 3)),))], (4, 4, 4), 2),
        ShapeError, "kernel has 2 entries",
    ),
    ("even window", lambda: Neighborhood(4), ShapeError, "odd"),
    (
        "wide window",
        lambda: place_switches([Block("n", 4, reach=(Neighborhood(5, 2),))], (16, 9), 2),
        ShapeError, r"window 5 x dilation 2 > 9",
    ),
    ("order", lambda: Scan((0, 0), 1, 1, 1), ShapeError, "each scanned dim once"),
    (
        "order dims",
        lambda: place_switches([Block("s", 4, reach=(Scan((2,), 1, 1, 1),))], (4, 4), 2),
        ShapeError, r"order \(2,\)",
    ),
    (
        "other patches",
        lambda: place_switches([Block("u", 4, reach=(Unpatches(2, (9, 9)),))], (4, 4), 2),
        ShapeError, r"\(5, 5\)",
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=[case[0] for case in BAD])
def test_bad_placements_are_refused_with_the_numbers(case) -> None:  # type: ignore[no-untyped-def]
    _, call, error, words = case
    with pytest.raises(error, match=words):
        call()
