"""Where switches are placed: what is chosen, ties, idle ranks, bad blocks."""

from __future__ import annotations

import numpy as np
import pytest

from xdist.cost.place import (
    Block,
    Condition,
    Convolution,
    Halo,
    Heads,
    Neighborhood,
    Patches,
    Scan,
    Spot,
    Unpatches,
)
from xdist.cost.place_spot import switched
from xdist.errors import ConfigError, LayoutError, ShapeError, StrategyError
from xdist.plan import place_switches

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
    """Two of three positions on one rank would move a little less than three of five."""
    blocks = [Block("temporal", 4, whole=(0,))]
    placed = place_switches(blocks, (7, 5, 3), 2, start=0)
    assert placed.dims == (1,)
    chosen, other = (switched((7, 5, 3), 0, dim, 2, 16) for dim in (1, 2))
    assert max(p.bytes for p in chosen) > max(p.bytes for p in other)
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
    runs = np.array_split(np.arange(size), degree)
    held = [rank for rank, run in enumerate(runs) for _ in run]
    for rank, passes in enumerate(option.moved):
        mine = runs[rank].tolist()
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
        ShapeError, "kernel is an integer, or one for each of 3 dims",
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
