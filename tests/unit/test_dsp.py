"""Five ways to shard a video transformer: formulas, exact bytes and predicted times."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import prod

import pytest

from xdist.cost.dsp import METHODS, Video, comparison, pair_bytes, pair_elements
from xdist.cost.dsp_time import H100, Cluster, pair_flops, predict
from xdist.cost.place import Block, Heads, Spot, place_switches
from xdist.cost.place_attention import mixed
from xdist.errors import ConfigError, LayoutError, ShapeError

EVEN = Video((8, 16, 4), heads=8, head_dim=4, batch=3)
UNEVEN = Video((7, 5, 3), heads=6, head_dim=2, batch=2, itemsize=8)


@pytest.mark.parametrize("degree", [2, 4, 8, 64])
def test_dsp_moves_a_quarter_and_a_half_of_ulysses(degree: int) -> None:
    """The baseline's name beside each ratio; DSP itself is 2 (M/P)(P-1)/P."""
    m = 2**20
    dsp = pair_elements("dsp", m, degree)
    assert dsp == Fraction(2 * m * (degree - 1), degree**2)
    assert dsp / pair_elements("ulysses_both", m, degree) == Fraction(1, 4)
    assert dsp / pair_elements("ulysses_one", m, degree) == Fraction(1, 2)
    assert dsp / pair_elements("ring", m, degree) == Fraction(1, degree)
    assert dsp / pair_elements("megatron_sp", m, degree, mlps=2) == Fraction(1, 4 * degree)
    assert pair_elements("megatron_sp", m, degree, mlps=2) == 8 * m * Fraction(degree - 1, degree)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("degree", [2, 4])
def test_even_shares_move_the_formula(method: str, degree: int) -> None:
    expected = pair_elements(method, EVEN.elements, degree, mlps=EVEN.mlps) * EVEN.itemsize
    for passes in pair_bytes(method, EVEN, degree):
        assert passes.forward.received_bytes == passes.forward.sent_bytes == expected
        again = 2 if method == "ring" else 1  # blocks once more, and gradients of float32
        assert passes.backward.received_bytes == again * expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("video", [EVEN, UNEVEN, Video((5, 7), 3, 2, dim=1, switch_to=0, mlps=0)])
def test_what_is_sent_is_received(method: str, video: Video) -> None:
    for degree in (1, 2, 3, 4):
        found = pair_bytes(method, video, degree)
        for way in ("forward", "backward"):
            moved = [getattr(passes, way) for passes in found]
            assert sum(m.sent_bytes for m in moved) == sum(m.received_bytes for m in moved)
        assert (sum(passes.bytes for passes in found) > 0) == (degree > 1)


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_dsp_is_what_the_planner_places(degree: int) -> None:
    """On uneven grids too, rank by rank."""
    c, size = UNEVEN.channels, UNEVEN.itemsize
    pair = [
        Block("temporal", c, whole=(0,), itemsize=size),
        Block("spatial", c, whole=(1, 2), itemsize=size),
    ]
    placed = place_switches(pair, UNEVEN.sizes, degree, start=0, end=0, batch=UNEVEN.batch)
    video = replace(UNEVEN, switch_to=placed.dims[0])
    assert placed.moved == pair_bytes("dsp", video, degree)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_embedded_methods_are_attentions_own_formulas(degree: int, dim: int) -> None:
    video = Video((7, 5), heads=6, head_dim=2, dim=dim, switch_to=1 - dim)
    spot = Spot(video.sizes, dim, degree, 1, video.channels, video.itemsize)
    ways = {way.strategy: way.moved for way in mixed((dim,), Heads(6, 2), spot)}
    assert pair_bytes("ulysses_one", video, degree) == ways["ulysses"]
    assert pair_bytes("ring", video, degree) == ways["ring"]
    both = pair_bytes("ulysses_both", video, degree)
    assert both == tuple(one + one for one in ways["ulysses"])


def test_the_table_names_the_baseline_of_each_ratio() -> None:
    table = comparison(EVEN, 4).table()
    assert "DSP moves 0.25 of Ulysses in both blocks" in table
    assert "DSP moves 0.5 of Ulysses in one block" in table
    assert "49,152" not in table.splitlines()[0]
    rows = {row.method: row for row in comparison(EVEN, 4).rows}
    assert rows["dsp"].ratio == 1
    assert rows["ulysses_both"].bytes == 4 * rows["dsp"].bytes


# Whole numbers: 10 bytes/s inside nodes of two, 1 byte/s between, a second a message.
SLOW = Cluster("slow", 2, 10.0, 1.0, 1.0, 1000.0)


def test_times_of_moves_by_hand() -> None:
    # Of 30 bytes to 3 others 10 stay inside (1 s) and 20 cross (20 s).
    assert SLOW.switch_s(30, 4) == 21
    assert SLOW.switch_s(30, 2) == 4
    # 3 hops of 5 bytes over the slow link; one over the fast one.
    assert SLOW.ring_s(5, 4) == 18
    assert SLOW.ring_s(5, 2) == 1.5
    # Half of 40 bytes enters a node over its two cards; three quarters arrive on a rank.
    assert SLOW.gather_s(40, 4) == 1 + max(10, 3)
    assert SLOW.gather_s(40, 2) == 1 + 2
    assert SLOW.switch_s(30, 1) == SLOW.gather_s(40, 1) == 0


def test_a_prediction_by_hand() -> None:
    """Four ranks in two nodes, M = 64 elements of 2 bytes, one pair."""
    video = Video((4, 4), heads=4, head_dim=1, mlps=1, itemsize=2)
    found = {row.method: row for row in predict(video, 4, SLOW, pairs=1).rows}
    flops = pair_flops(video)
    assert flops == {
        "projections": 2 * 8 * 16 * 16, "temporal": 4 * 16 * 4 * 4, "spatial": 4 * 16 * 4 * 4,
        "mlps": 16 * 16 * 16,
    }  # fmt: skip
    assert found["dsp"].compute_s == pytest.approx(3 * sum(flops.values()) / 4 / 1000)
    # A rank sends 24 bytes a switch: 8 inside, 16 between. Two there and two back.
    assert found["dsp"].communication_s == 4 * (1 + 16)
    assert found["dsp"].sent_bytes == 4 * 24
    # q, k, v: 72 bytes, 48 of them between; the output 16; both ways, in one block or in two.
    assert found["ulysses_one"].communication_s == 2 * (49 + 17)
    assert found["ulysses_both"].communication_s == 4 * (49 + 17)
    # Three branches, a gather and a scatter each way: 64 of 128 bytes enter a node over two cards.
    assert found["megatron_sp"].communication_s == 12 * (1 + 32)
    # 64 bytes of keys and values a hop, twice as many back; attention hides 0.064 and 0.128 s.
    hidden = flops["temporal"] / 4 / 1000
    ring = 3 * (1 + 64) + 3 * (1 + 128) - 3 * hidden
    assert found["ring"].communication_s == pytest.approx(ring)
    for row in found.values():
        assert row.step_s == row.communication_s + row.compute_s
        assert row.tokens_per_s == pytest.approx(16 / row.step_s)
        assert 1 + row.faster == pytest.approx(row.step_s / found["dsp"].step_s)


def test_uneven_shares_wait_for_the_largest() -> None:
    """Five frames on four ranks: one computes two of them. Ulysses waits for heads likewise."""
    video = Video((5, 8), heads=6, head_dim=2, mlps=0)
    found = {row.method: row.compute_s for row in predict(video, 4, SLOW, pairs=1).rows}
    flops = pair_flops(video)
    half = flops["projections"] / 2
    frames, rows, heads = 2 / 5, 2 / 8, 2 / 6
    dsp = frames * (half + flops["spatial"]) + rows * (half + flops["temporal"])
    assert found["dsp"] == pytest.approx(3 * dsp / 1000)
    one = frames * (2 * half + flops["spatial"]) + heads * flops["temporal"]
    assert found["ulysses_one"] == pytest.approx(3 * one / 1000)


def test_the_predictions_of_the_docs() -> None:
    """8 and 64 GPUs, frames growing with the ranks: DSP is ahead of every method, and what it
    sends does not grow."""
    sent = []
    for degree in (8, 64):
        video = Video((8 * degree, 64, 64), heads=64, head_dim=32, mlps=2, itemsize=2)
        found = predict(video, degree, H100)
        others = [row for row in found.rows if row.method != "dsp"]
        assert all(row.faster > 0 for row in others)
        sent.append(found.rows[0].sent_bytes)
        assert "DSP is" in found.table()
        assert prod(video.sizes) == 8 * degree * 4096
    assert sent[1] / sent[0] == pytest.approx((63 / 64) / (7 / 8))


def test_bad_comparisons_are_refused() -> None:
    with pytest.raises(LayoutError, match="between frames and a dim of space"):
        Video((4, 4, 4), 2, 2, dim=1, switch_to=2)
    with pytest.raises(LayoutError, match="at least one dim of space"):
        Video((4,), 2, 2)
    with pytest.raises(ShapeError, match="heads must be at least 1"):
        Video((4, 4), 0, 2)
    with pytest.raises(ConfigError, match="no such method: 'usp'"):
        pair_bytes("usp", EVEN, 2)
    with pytest.raises(ConfigError, match="with dsp"):
        predict(EVEN, 2, methods=("ring",))
