"""xdist.ssd: law 1 over ranks, bytes, memory, leaks, the state that crosses, and bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank.recurrence_cases import (
    PACKED,
    WAYS,
    Case,
    Inputs,
    N,
    Op,
    check_law_1,
    check_law_1_in_bfloat16,
    count_bytes,
    grid,
    leaks,
    state_matters,
)
from tests.multirank.test_linear_strategies import PeakBytes
from xdist.errors import NumericsError, ShapeError
from xdist.parallel import recurrent_work, ssd, ssd_local
from xdist.shard import resolve
from xdist.testing import RankPool, layouts
from xdist_kernels.linear.ssd_reference import ssd_reference

BATCH, HEADS, STATE, WIDTH = 2, 4, 3, 2
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def draw(variant: str, generator: torch.Generator) -> Inputs:
    """variant: the groups of B and C, with or without the skip D."""
    groups, skip = int(variant[0]), "D" in variant

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {
        "x": normal(BATCH, N, HEADS, WIDTH),
        "dt": 0.01 + 0.2 * torch.rand(BATCH, N, HEADS, generator=generator, dtype=torch.float64),
        # Decays near 1: what crosses the ranks then matters to the last token.
        "A": -0.02 - 0.2 * torch.rand(HEADS, generator=generator, dtype=torch.float64),
        "B": normal(BATCH, N, groups, STATE),
        "C": normal(BATCH, N, groups, STATE),
    }
    if skip:
        found["D"] = normal(HEADS)
    return found


def reference(
    inputs: Inputs, initial: Tensor | None, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    return ssd_reference(**inputs, initial_state=initial, cu_seqlens=cuts)


OP = Op(
    "ssd",
    draw,
    reference,
    (BATCH, HEADS, STATE, WIDTH),
    variants=("1 D", "2", "4 D"),
    like="x",
)


def check(parts: int, dtype: torch.dtype, pool: RankPool | None) -> None:
    check_law_1(OP, grid(OP, parts, dtype, each=1), pool)


@DTYPES
def test_law_1_on_one_rank(dtype: torch.dtype) -> None:
    check(1, dtype, None)


@DTYPES
def test_law_1_on_two_ranks(dtype: torch.dtype, pool2: RankPool) -> None:
    check(2, dtype, pool2)


@DTYPES
def test_law_1_on_three_ranks(dtype: torch.dtype, pool3: RankPool) -> None:
    check(3, dtype, pool3)


@DTYPES
def test_law_1_on_four_ranks(dtype: torch.dtype, pool4: RankPool) -> None:
    check(4, dtype, pool4)


def test_law_1_in_bfloat16(pool3: RankPool) -> None:
    check_law_1_in_bfloat16(OP, pool3, 3, (("scan", "auto"), ("switch", "auto")))


@pytest.mark.slow
@DTYPES
def test_law_1_on_more_layouts(dtype: torch.dtype, pool3: RankPool, pool4: RankPool) -> None:
    check_law_1(OP, grid(OP, 3, dtype, seeds=2), pool3)
    check_law_1(OP, grid(OP, 4, dtype, seeds=2), pool4)


def test_ledger_is_the_formula_is_the_second_count(pool2: RankPool, pool3: RankPool) -> None:
    for parts, pool in ((2, pool2), (3, pool3)):
        cases = grid(OP, parts, torch.bfloat16, each=1)
        pool.run(count_bytes, OP, cases[parts::2])


def peak_of(n: int) -> tuple[int, int]:
    """(bytes of this rank's inputs, most bytes made and held in forward and backward)."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(n, 2))
    x, b, c = (torch.randn(1, n // 2, heads, 32).requires_grad_() for heads in (2, 1, 1))
    dt, a = torch.rand(1, n // 2, 2).requires_grad_(), -torch.rand(2)
    with pytest.MonkeyPatch.context() as patch, PeakBytes() as peak:
        patch.setattr(recurrent_work, "KEPT_BYTES", 0)
        out = xdist.ssd(x, dt, a, b, c, shard, strategy="scan")
        torch.autograd.grad(out, [x, dt, b, c], out.detach())
    return sum(t.nbytes for t in (x, dt, b, c)), peak.peak


def test_scan_never_holds_the_sequence(pool2: RankPool) -> None:
    """dt x, the outputs and the gradients are twice this rank's inputs; beyond them memory does not
    grow. A scan that gathered the sequence would hold those inputs once more."""
    short, long = pool2.run(peak_of, 16_384), pool2.run(peak_of, 65_536)
    for (few, low), (many, high) in zip(short, long, strict=True):
        assert high - low < 2.05 * (many - few)


def test_nothing_leaks_and_the_state_that_crosses_matters(pool3: RankPool) -> None:
    drawn = layouts(N, 3, seed=1)["drawn"]
    for strategy, algorithm in WAYS:
        case = Case(tuple(tuple(drawn.segments(r)) for r in range(3)), "2", strategy, algorithm)
        assert pool3.run(leaks, OP, case, 20) == [(True, True)] * 3
    contiguous = tuple(tuple(layouts(N, 3)["contiguous"].segments(r)) for r in range(3))
    first, *later = pool3.run(state_matters, OP, Case(contiguous, "2"))
    assert first == 0.0
    assert min(later) > 1e-2


def test_decays_are_wide_with_bfloat16_inputs() -> None:
    """dt and A in float32 beside bfloat16 tokens: their product stays float32."""
    x = torch.randn(1, 8, 2, 2, dtype=torch.bfloat16)
    dt, a = torch.rand(1, 8, 2), -torch.rand(2)
    request = ssd.request(x, dt, a, x, x, resolve(None, 8))
    assert request.inputs[3].dtype == torch.float32
    assert torch.equal(request.inputs[3][..., 0], dt * a)


def test_steps_and_skip_go_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """dt x and out + D x over several tiles, values and gradients, against plain autograd."""
    monkeypatch.setattr(ssd_local, "TILE_TOKENS", 5)
    torch.manual_seed(0)
    x, out = (torch.randn(2, 13, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dt = torch.rand(2, 13, 3, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(3, dtype=torch.float64, requires_grad=True)
    pairs = (
        (ssd_local.Values.apply(dt, x), dt[..., None] * x, (dt, x)),
        (ssd_local.Skip.apply(out, x, skip), out + skip[:, None] * x, (out, x, skip)),
    )
    for found, want, leaves in pairs:
        torch.testing.assert_close(found, want)
        grads = (torch.autograd.grad(y, leaves, torch.ones_like(x)) for y in (found, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def refused() -> list[str]:
    """What each wrong call says, on this rank of two."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(N, 2), PACKED)
    n = shard.local_length
    good = {
        "x": torch.ones(1, n, 4, 2),
        "dt": torch.ones(1, n, 4),
        "A": -torch.ones(4),
        "B": torch.ones(1, n, 2, 3),
        "C": torch.ones(1, n, 2, 3),
    }
    wrong = (
        {"B": torch.ones(1, n, 3, 3), "C": torch.ones(1, n, 3, 3)},
        {"dt": torch.ones(1, n, 1)},
        {"A": -torch.ones(4, 3)},
        {"C": torch.ones(1, n, 2, 5)},
        {"C": torch.ones(1, n, 2, 3).bfloat16()},
        {"initial_state": torch.zeros(1, 4, 3, 2)},
        {"D": torch.ones(2)},
    )
    found = []
    for change in wrong:
        with pytest.raises(ShapeError) as caught:
            xdist.ssd(**{**good, **change}, shard=shard)
        found.append(str(caught.value))
    bad = {"dt": torch.ones(1, n, 4), "A": -torch.ones(4)}
    if mesh.sequence_rank == 1:
        bad["dt"][0, 3, 1] = 0.0
        bad["A"][2] = 0.5
    for name, x in bad.items():
        with xdist.checks(), pytest.raises(NumericsError) as numbers:
            xdist.ssd(**{**good, name: x}, shard=shard)
        found.append(str(numbers.value))
    return found


def test_bad_input_is_refused_with_its_numbers_on_every_rank(pool2: RankPool) -> None:
    for found in pool2.run(refused):
        groups, steps, decays, other, dtype, state, skip, low, high = found
        assert "4 heads, 3 groups" in groups
        assert "dt must be [B,n,H]" in steps
        assert "got [1, " in steps
        assert "A must be [H] = [4]" in decays
        assert "got [4, 3]" in decays
        assert "C must be [B,n,G,N], as B," in other
        assert "C torch.bfloat16" in dtype
        assert "[B, documents, H, N, D] = [1, 7, 4, 3, 2]" in state
        assert "D must be [H] = [4]" in skip
        for message in (low, high):
            assert "dt above 0 and A at most 0" in message
            assert "sequence ranks [1]" in message
    first, second = (found[-2:] for found in pool2.run(refused))
    assert "least_dt 0" in second[0]
    assert "highest_A 0.5" in second[1]
    assert "least_dt 1" in first[0]
