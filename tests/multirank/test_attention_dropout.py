"""Dropout inside attention: the same probabilities fall for every number of ranks and strategy.

With values that are rows of the identity, the output is the matrix of probabilities itself: what
is exactly 0 was masked or dropped, so masks are compared bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank.attention_dense import kept_pairs
from xdist.errors import ShapeError
from xdist.memory.checkpoint import checkpoint
from xdist.rank import read_rank
from xdist.shard import SequenceShard
from xdist.testing import RankPool

BATCH, LENGTH, HEADS, GROUPS, DIM = 2, 23, 4, 2, 4
CUTS = [0, 9, 9, LENGTH]
DROP = xdist.Dropout(0.3, seed=2**63 + 11, step=5, layer=3, first_row=7)
WINDOW = xdist.Mask(causal=True, window=6)
DRAWN = [[(5, 9), (20, 23)], [(0, 5)], [(9, 20)], []]


class Case(NamedTuple):
    strategy: str
    layout: str = "contiguous"
    mask: xdist.Mask = WINDOW
    documents: list[int] | None = None
    ulysses: int = 1
    head_chunks: int = 1


CASES = {
    1: [Case("auto"), Case("auto", documents=CUTS)],
    2: [
        Case("ulysses", "zigzag", head_chunks=2),
        Case("ring", "zigzag", documents=CUTS),
        Case("gather"),
        Case("halo", documents=CUTS),
    ],
    3: [Case("ulysses"), Case("ring"), Case("halo", "zigzag")],
    4: [
        Case("ring", "drawn"),
        Case("gather", "drawn", documents=CUTS),
        Case("halo", "drawn"),
        Case("ulysses", "drawn", documents=CUTS),
        Case("2d", "zigzag", ulysses=2),
    ],
}


@lru_cache
def inputs(seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v of random values, v of the identity, and a weight of the outputs; float64."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, LENGTH, HEADS, DIM, generator=draw, dtype=torch.float64)
    k = torch.randn(BATCH, LENGTH, GROUPS, DIM, generator=draw, dtype=torch.float64)
    v = torch.randn(BATCH, LENGTH, GROUPS, DIM, generator=draw, dtype=torch.float64)
    eye = torch.eye(LENGTH, dtype=torch.float64)[None, :, None].expand(BATCH, -1, GROUPS, -1)
    weight = torch.randn(BATCH, LENGTH, HEADS, DIM, generator=draw, dtype=torch.float64)
    return q, k, v, eye.contiguous(), weight


def expected(documents: list[int] | None, drop: xdist.Dropout = DROP) -> list[Tensor]:
    """Probabilities [B, N, H, N] after dropout; then gradients of q, k and v; written out."""
    q, k, v, _, weight = (x.clone().requires_grad_() for x in inputs())
    rows = range(drop.first_row, drop.first_row + BATCH)
    seeds = (drop.seed, drop.step, drop.layer)
    kept = kept_pairs(drop.rate, seeds, rows, HEADS, LENGTH, LENGTH)
    at = torch.arange(LENGTH)
    document = torch.bucketize(at, torch.tensor(documents or [0, LENGTH]), right=True)
    apart = at[:, None] - at
    seen = (document[:, None] == document) & (apart >= 0) & (apart <= 6)
    many = [x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v)]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, many[0]) * DIM**-0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1) * kept / (1 - drop.rate)
    out = torch.einsum("bhnm,bmhd->bnhd", p, many[1])
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    return [p.detach().transpose(1, 2), *gradients]


def run_case(case: Case, drop: xdist.Dropout | None = DROP) -> list[Tensor]:
    """What `expected` gives, from this world's ranks, whole on every rank."""
    ring = read_rank().world_size // case.ulysses
    mesh = xdist.init_mesh(data=1, ring=ring, ulysses=case.ulysses)
    if case.layout == "drawn":
        layout = xdist.Layout.from_segments(LENGTH, DRAWN)
    else:
        layout = getattr(xdist.Layout, case.layout)(LENGTH, mesh.sequence_size)
    shard = SequenceShard(mesh, layout, case.documents)
    options: dict[str, Any] = {
        "mask": case.mask, "strategy": case.strategy, "dropout": drop,
        "head_chunks": case.head_chunks,
    }  # fmt: skip
    q, k, v, eye, weight = (shard.scatter(x) for x in inputs())
    with torch.no_grad():
        p = xdist.attention(q, k, eye, shard, **options)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out = xdist.attention(*given, shard, **options)
    gradients = torch.autograd.grad((out * weight).sum(), given)
    return [shard.gather(x).detach() for x in (p, *gradients)]


def run_all(ranks: int) -> list[list[Tensor]]:
    return [run_case(case) for case in CASES[ranks]]


def check(ranks: int, found: list[list[Tensor]]) -> None:
    for case, (p, *gradients) in zip(CASES[ranks], found, strict=True):
        wanted, *wanted_gradients = expected(case.documents)
        assert torch.equal(p != 0, wanted != 0), case
        torch.testing.assert_close(p, wanted, rtol=1e-12, atol=1e-14)
        for mine, theirs in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_one_rank_drops_what_the_rule_names() -> None:
    check(1, run_all(1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_strategy_and_layout_drops_the_same(
    ranks: int, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for found in pool.run(run_all, ranks):
        check(ranks, found)


def dropped(**changes: int) -> Tensor:
    """Which probabilities survive on one rank, for DROP with these numbers changed."""
    names = {name: getattr(DROP, name) for name in ("seed", "step", "layer", "first_row")}
    return run_case(Case("auto"), xdist.Dropout(DROP.rate, **(names | changes)))[0] != 0


def test_seed_step_layer_and_row_each_draw_anew_and_rows_are_global() -> None:
    here = dropped()
    assert torch.equal(here, dropped())
    for change in ({"seed": 1}, {"step": 6}, {"layer": 4}, {"first_row": 9}):
        assert not torch.equal(here, dropped(**change)), change
    # Row 1 of this rank is row 0 of the data rank that begins one row later.
    assert torch.equal(here[1], dropped(first_row=DROP.first_row + 1)[0])


def test_a_recompute_drops_the_same() -> None:
    q, k, v, _, weight = (x.clone().requires_grad_() for x in inputs())

    def call(x: Tensor) -> Tensor:
        return xdist.attention(x, k, v, mask=WINDOW, dropout=DROP)

    (again,) = torch.autograd.grad((checkpoint(call, q) * weight).sum(), q)
    assert torch.equal(again, torch.autograd.grad((call(q) * weight).sum(), q)[0])


def test_a_rate_of_zero_drops_nothing_and_rates_out_of_range_are_refused() -> None:
    plain = run_case(Case("auto"), None)
    none = run_case(Case("auto"), xdist.Dropout(0.0, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(plain, none, strict=True))
    wrong: tuple[Any, ...] = (-0.1, 1.0, float("nan"), False, "0.1", torch.tensor(0.1))
    for rate in wrong:
        with pytest.raises(ShapeError, match="rate in"):
            xdist.Dropout(rate, seed=1)
