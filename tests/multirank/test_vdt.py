"""The video diffusion transformer: one device's numbers on any number of ranks, counted bytes."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from tests.multirank.vdt_cases import (
    ODD,
    Bytes,
    Result,
    all_moved,
    compared,
    inputs,
    inputs_differ,
    local_refused,
    passed,
    reference,
    sampled,
    saved_bytes,
    trained,
)
from xdist.certify import certify_config
from xdist.config import load, override
from xdist.cost.dsp import Video, pair_bytes, pair_elements
from xdist.cost.moves import Moved
from xdist.cost.place import Passes
from xdist.models.vdt import SHARDINGS, VDTConfig, build
from xdist.testing import RankPool

ROOT = Path(__file__).resolve().parents[2]
# Four tokens along each dim and four heads: shares of two and four ranks are even.
EVEN = VDTConfig(
    sizes=(4, 4, 4), channels=3, dim=16, depth=2, head_dim=4, dtype="float64", recompute=False
)


@pytest.fixture(scope="module")
def alone() -> Result:
    """One rank's outputs, loss and gradients."""
    return passed(ODD)


def test_one_rank_gives_what_loops_give(alone: Result) -> None:
    """Outputs, loss over unknown positions and every gradient, beside loops in float64."""
    model = build(ODD, seed=0)
    x, noise = inputs(ODD)
    leaf = x.clone().requires_grad_()
    out = reference(model, leaf)
    unknown = (1 - x[..., -2:-1]).expand_as(noise)
    loss = ((out - noise).square() * unknown).sum() / unknown.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = Result(out.detach(), loss.detach(), leaf.grad, gradients)  # type: ignore[arg-type]
    assert alone.differs(expected) == []
    positions = int((x[..., -2] == 0).sum())
    for other in (passed(replace(ODD, recompute=False)), passed(ODD, given=positions)):
        assert other.differs(expected) == []


def everywhere(alone: Result) -> list[tuple[VDTConfig, int, Result]]:
    """Each way to shard it, sharded first along each dim."""
    ways = [replace(ODD, strategy=name) for name in SHARDINGS]
    return [(config, dim, alone) for config in ways for dim in range(len(ODD.sizes))]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_way_to_shard_it_gives_one_rank(
    ranks: int, alone: Result, request: pytest.FixtureRequest
) -> None:
    """dsp along each dim, the others along one: uneven and empty shares, ranks without a head."""
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    cases = everywhere(alone)
    cases = cases[:3] + [cases[3 * way + (way + ranks) % 3] for way in range(1, len(SHARDINGS))]
    for wrong in pool.run(compared, cases):
        assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_embedded_way_along_every_dim_gives_one_rank(
    ranks: int, alone: Result, request: pytest.FixtureRequest
) -> None:
    """The embedded ways; dsp runs along every dim in the fast test."""
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for wrong in pool.run(compared, everywhere(alone)[3:]):
        assert wrong == []


def test_ranks_without_a_position_are_told_the_time(pool4: RankPool) -> None:
    """Three frames on four ranks: the fourth holds tokens only after a switch."""
    config = replace(ODD, sizes=(3, 5, 6), depth=1)
    assert pool4.run(compared, [(config, 0, passed(config))]) == [[]] * 4


def test_inputs_are_those_of_one_rank(pool3: RankPool) -> None:
    """Noise, times and masks do not depend on the ranks, and nothing moves for them."""
    assert pool3.run(inputs_differ, ODD) == [[]] * 3


def test_sampling_gives_the_video_of_one_rank(pool3: RankPool) -> None:
    expected = sampled(ODD, None)
    for found in pool3.run(sampled, ODD, 0):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_the_config_is_certified_on_2_3_and_4_ranks(
    pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    """`xdist certify` of the example with fewer layers, sharded first along each dim."""
    small = ["model.dim=16", "model.head_dim=8", "model.depth=1", "certify.sizes=[5,6,7]"]
    config = override(load(ROOT / "configs" / "video.toml"), small)
    report = certify_config(config, pools={2: pool2, 3: pool3, 4: pool4})
    assert report.passed, report.table()
    assert [(row.ranks, row.dim) for row in report.rows if row.dtype == "float64"] == [
        (1, 0), *((ranks, dim) for ranks in (2, 3, 4) for dim in range(3))
    ]  # fmt: skip
    assert all(row.sent_bytes == row.planned_bytes for row in report.rows)


def test_local_attention_over_a_sharded_dim_is_refused(pool2: RankPool) -> None:
    assert pool2.run(local_refused, 1) == ["", ""]
    for said in pool2.run(local_refused, 0):
        assert "dim 0 of (4, 4) lies on 2 ranks" in said
        assert "switch the grid" in said


def pairs_moved(
    pool: RankPool, config: VDTConfig, cases: list[tuple[str, int]]
) -> list[list[Passes]]:
    """By rank and case of strategy and dim: what one more layer moves, by ledger and c10d."""
    models = [
        (replace(config, strategy=strategy, depth=depth), dim)
        for strategy, dim in cases
        for depth in (1, 2)
    ]
    ranks = []
    for found in pool.run(all_moved, models):
        for one in found:
            assert one.counted == [one.forward, one.backward]
        pairs = zip(found[::2], found[1::2], strict=True)
        ranks.append([one_more_layer(*pair) for pair in pairs])
    return ranks


def one_more_layer(low: Bytes, high: Bytes) -> Passes:
    return Passes(
        *(
            Moved(*(b - a for a, b in zip(*both, strict=True)))
            for both in ((low.forward, high.forward), (low.backward, high.backward))
        )
    )


def of_config(config: VDTConfig, dim: int) -> Video:
    heads = config.dim // config.head_dim
    return Video(config.grid, heads, config.head_dim, dim, switch_to=0 if dim else 1, itemsize=8)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_pair_moves_what_is_claimed(ranks: int, request: pytest.FixtureRequest) -> None:
    """Elements that a spatial and a temporal block and their MLP receive, by way to shard."""
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    dims = (0, 1, 2) if ranks == 2 else (0,)
    cases = [(strategy, dim) for strategy in SHARDINGS for dim in dims]
    moved = prod(EVEN.grid) * EVEN.dim
    received = {}
    for rank, found in enumerate(pairs_moved(pool, EVEN, cases)):
        for (strategy, dim), passes in zip(cases, found, strict=True):
            assert passes == pair_bytes(strategy, of_config(EVEN, dim), ranks)[rank]
            assert passes.forward.received_bytes == 8 * pair_elements(strategy, moved, ranks)
            received[strategy] = passes.received_bytes
    assert received["dsp"] == 2 * 8 * 2 * (moved // ranks) * (ranks - 1) // ranks
    assert received["dsp"] * 4 == received["ulysses_both"]
    assert received["dsp"] * 2 == received["ulysses_one"]
    assert received["dsp"] < min(received["ring"], received["megatron_sp"])


def test_a_pair_moves_what_is_counted_for_uneven_shares(pool3: RankPool) -> None:
    """Two, two and one of five frames; two heads for three ranks. Embedded methods."""
    cases = [(strategy, 0) for strategy in SHARDINGS if strategy != "dsp"]
    config = replace(ODD, recompute=False)
    for rank, found in enumerate(pairs_moved(pool3, config, cases)):
        for (strategy, dim), passes in zip(cases, found, strict=True):
            assert passes == pair_bytes(strategy, of_config(config, dim), 3)[rank], strategy


def test_bytes_of_uneven_shares_are_those_of_the_placement(pool3: RankPool) -> None:
    """Every rank's, whole model, forward and backward: patches and switches included."""
    cases = [(replace(ODD, recompute=again), dim) for again in (False, True) for dim in range(3)]
    ranks = pool3.run(all_moved, cases)
    for number, (config, dim) in enumerate(cases):
        moved = build(config, seed=0).placement(3, dim=dim).moved
        for rank, found in enumerate(ranks):
            assert found[number].forward == tuple(moved[rank].forward), (dim, rank)
            assert found[number].backward == tuple(moved[rank].backward), (dim, rank)


def test_few_frames_are_not_switched_to(pool4: RankPool) -> None:
    """Two frames would leave two of four ranks idle: attention over space becomes Ulysses."""
    config = replace(EVEN, sizes=(2, 4, 8), depth=1)
    placed = build(config, seed=0).placement(4, dim=1)
    assert placed.strategies == ("", "", "ulysses", "", "")
    assert placed.switches == 0
    assert pool4.run(compared, [(config, 1, passed(config))]) == [[]] * 4
    for rank, (found,) in enumerate(pool4.run(all_moved, [(config, 1)])):
        assert found.forward == tuple(placed.moved[rank].forward)
        assert found.backward == tuple(placed.moved[rank].backward)


def test_twenty_steps_are_those_of_one_rank(pool4: RankPool) -> None:
    config = replace(ODD, depth=1)
    alone = trained(config, 0, 20)
    for losses in pool4.run(trained, config, 1, 20):
        assert losses == pytest.approx(alone, rel=1e-10)
    assert alone[-1] < 0.8 * alone[0]


SAVED = VDTConfig(sizes=(12, 12, 12), dim=16, depth=2, head_dim=8, dtype="float64", recompute=False)


def test_saved_activations_fall_as_one_over_the_ranks(
    pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    """Storages kept for backward, each once, of the fullest rank; the table of the docs page."""
    alone = saved_bytes(SAVED, 0)
    found = {1: alone}
    for ranks, pool in ((2, pool2), (3, pool3), (4, pool4)):
        found[ranks] = max(pool.run(saved_bytes, SAVED, 0))
        assert found[ranks] * ranks == pytest.approx(alone, rel=0.1)
    page = (ROOT / "docs" / "grids" / "vdt.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([\d,]+) \|", page, re.MULTILINE)
    table = {int(ranks): int(held.replace(",", "")) for ranks, held in rows}
    assert found == pytest.approx(table, rel=0.02), found  # versions of torch may differ a little
