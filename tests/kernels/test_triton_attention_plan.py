"""Which blocks attention's Triton kernels visit, and sizes past 16 and 31 bits; interpreter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted_grid import only_last_programs, only_programs
from xdist_kernels.attention import triton as door
from xdist_kernels.attention import triton_plan
from xdist_kernels.attention.triton_plan import FAN, MOST, Plan, Plans
from xdist_kernels.attention.triton_tiles import Tile
from xdist_kernels.launch import Config

Spans = tuple[Tensor, Tensor, Tensor, Tensor]
FAR = 2**62


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)


def visible(spans: Spans, at: Tensor) -> Tensor:
    """Bool `[n, m]` of spans `[n]`."""
    lo, hi, prefix_lo, prefix_hi = (s[:, None] for s in spans)
    return ((at >= lo) & (at < hi)) | ((at >= prefix_lo) & (at < prefix_hi))


def visits(plan: Plan, side: int, block: int) -> list[tuple[int, bool]]:
    """(block visited, whether without a mask) by one block, in order."""
    found = []
    for piece in range(int(plan.counts[side, block])):
        start, full, partial, stop = plan.visits[side, block, piece].tolist()
        assert start <= full <= partial <= stop
        found += [(i, full <= i < partial) for i in range(start, stop)]
    return found


def check_plan(plan: Plan, seen: Tensor, own: int, other: int) -> int:
    """seen bool `[tokens of the side, tokens of the other]`: each visible pair is in one visit, a
    visit without a mask is all visible. Returns the visits of blocks in which nothing is seen."""
    wasted = 0
    for block, rows in enumerate(seen.split(own)):
        met = visits(plan, 0, block)
        numbers = [i for i, _ in met]
        assert numbers == sorted(set(numbers))
        covered = torch.zeros(seen.shape[1], dtype=torch.bool)
        for i, full in met:
            part = rows[:, i * other : (i + 1) * other]
            assert part.shape[1] > 0
            assert not full or (part.shape[1] == other and bool(part.all()))
            wasted += not bool(part.any())
            covered[i * other : (i + 1) * other] = True
        assert not bool((rows & ~covered).any())
    return wasted


def drawn_problem(seed: int) -> tuple[Spans, Tensor]:
    """Segments in any order on either side, documents, a window and prefixes, far positions."""
    made = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=made))

    total, step = 400, number(0, 2) * 2**33
    cuts = sorted({0, total, *(number(1, total) for _ in range(number(1, 6)))})
    runs = [torch.arange(a, b) for a, b in pairwise(cuts)]
    order = torch.randperm(len(runs), generator=made).tolist()
    at = torch.cat([runs[i] for i in order])[: number(1, total)]
    own = torch.cat([runs[i] for i in reversed(order)])[number(0, 200) :]
    size = number(30, 200)
    start = own // size * size
    lo = torch.maximum(start, own - number(0, 60)) if number(0, 2) else start
    prefix = torch.minimum(start + number(0, 20), lo)
    hi = own + 1 if number(0, 2) else start + size
    ends = [x + torch.where(x > 200, step, 0) for x in (lo, hi, start, prefix)]
    at = at + torch.where(at > 200, step, 0)
    return (ends[0], ends[1], ends[2], ends[3]), at


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 12))]
)
def test_a_plan_visits_each_visible_pair_once_and_masks_what_is_not_full(seed: int) -> None:
    spans, at = drawn_problem(seed)
    seen = visible(spans, at)
    plans = Plans(spans, at)
    check_plan(plans.queries(32, 16), seen, 32, 16)
    check_plan(plans.keys(16, 32), seen.T, 32, 16)


def test_causal_blocks_below_the_diagonal_have_no_mask_and_those_above_are_not_visited() -> None:
    own, zero = torch.arange(70), torch.zeros(70, dtype=torch.int64)
    plans = Plans((zero, own + 1, zero, zero), own)
    plan = plans.queries(16, 16)
    for block in range(5):
        assert visits(plan, 0, block) == [(i, i < block) for i in range(block + 1)]
    plan = plans.keys(16, 16)
    for block in range(5):
        # The last block of queries is not whole: it is masked.
        assert visits(plan, 0, block) == [(i, block < i < 4) for i in range(block, 5)]
    assert plans.keys(16, 16) is plan


def test_heads_that_see_differently_have_plans_of_their_own() -> None:
    own, zero = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    lo = (own[None] - torch.tensor([0, 16, 64])[:, None]).clamp(min=0)
    plan = Plans((lo, own + 1, zero.int(), zero), own)
    found = plan.queries(16, 16)
    assert [len(visits(found, head, 3)) for head in range(3)] == [1, 2, 4]
    found = plan.keys(16, 16)
    assert [len(visits(found, head, 0)) for head in range(3)] == [1, 2, 4]


def test_more_pieces_than_a_plan_holds_are_joined_and_masked() -> None:
    """Every other block of keys is seen: what follows the last piece is masked, none left out."""
    blocks = 2 * MOST + 9
    at = torch.arange(blocks * 16)
    at = at + torch.where(at // 16 % 2 == 1, FAR // 2, 0)
    zero = torch.zeros(16, dtype=torch.int64)
    spans = (zero, zero + FAR // 2, zero, zero)
    plan = Plans(spans, at).queries(16, 16)
    assert int(plan.counts[0, 0]) == MOST
    assert check_plan(plan, visible(spans, at), 16, 16) <= blocks // 2 - MOST + 1
    met = visits(plan, 0, 0)
    assert met[: MOST - 1] == [(2 * i, True) for i in range(MOST - 1)]
    assert all(not full for i, full in met if i > 2 * MOST)


@pytest.mark.parametrize("shift", [0, 40])
def test_documents_packed_in_a_million_tokens_cost_what_they_hold(
    shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 Ki documents of 128 tokens, on the borders of blocks or beside them: drawn blocks visit
    the blocks of their own documents and no others, found in one step of WIDE nodes and through
    at most two nodes of FAN blocks; 1 Mi tokens squared are never walked through."""
    n, size, rows, keys = 2**20, 128, 128, 64
    own, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    start = ((own + shift) // size * size - shift).clamp(min=0)
    drawn_blocks = torch.randint(1, n // size - 1, (8,), generator=torch.Generator().manual_seed(0))
    blocks = [0, *drawn_blocks.tolist(), n // size - 1]
    met: list[int] = []
    joined = triton_plan._joined

    def noting(*args: Any) -> Any:
        met.append(len(args[1].handle.data))
        return joined(*args)

    monkeypatch.setattr(triton_plan, "_joined", noting)
    grids = only_programs(monkeypatch, "xdist_kernels.attention.triton_plan", lambda _: blocks)
    fill_hulls(monkeypatch, own, start, own + 1, rows, keys)
    plans = Plans((start, own + 1, zero, zero), own)
    for plan, other in ((plans.queries(rows, keys), keys), (plans.keys(64, 128), 64)):
        for block in blocks:
            here = slice(block * size, (block + 1) * size)
            first, last = int(start[here][0]), here.stop - 1
            if plan is not plans.queries(rows, keys):
                # From the first of these keys to the last query whose document began by then.
                first = here.start
                last = min(n, int(start[here][-1]) + size) - 1
            wanted = list(range(first // other, last // other + 1))
            assert [i for i, _ in visits(plan, 0, block)] == wanted
            assert len(wanted) <= (2 if shift == 0 else 5)
    assert set(met) == {FAN}
    assert 2 * len(blocks) <= len(met) <= (2 if shift == 0 else 4) * len(blocks)
    assert grids == [n // rows, n // 128]
    assert n // keys // FAN <= triton_plan.WIDE


def fill_hulls(
    monkeypatch: pytest.MonkeyPatch, at: Tensor, lo: Tensor, hi: Tensor, rows: int, keys: int
) -> None:
    """What the kernels that make hulls would write, in torch: they would take minutes here."""
    launch = triton_plan.launch

    def instead(kernel: Any, programs: int, config: Config, **given: Any) -> None:
        if kernel is triton_plan.key_hulls_kernel:
            ends = at.view(-1, keys).amin(1), at.view(-1, keys).amax(1)
            given["p_hulls"].copy_(torch.stack(ends))
            given["p_nodes"].copy_(
                torch.stack([ends[0].view(-1, FAN).amin(1), ends[1].view(-1, FAN).amax(1)])
            )
        elif kernel is triton_plan.query_hulls_kernel:
            low, high = lo.view(-1, given["ROWS"]), hi.view(-1, given["ROWS"])
            ends = low.amin(1), high.amax(1), low.amax(1), high.amin(1)
            none = torch.full_like(low[:, 0], FAR)
            given["p_hulls"].copy_(torch.stack([*ends, none, -none, none, -none])[:, None])
            low, high = ends[0].view(-1, FAN).amin(1), ends[1].view(-1, FAN).amax(1)
            none = torch.full_like(low, FAR)
            given["p_nodes"].copy_(torch.stack([low, high, none, -none])[:, None])
        else:
            launch(kernel, programs, config, **given)

    monkeypatch.setattr(triton_plan, "launch", instead)


def test_grids_past_65535_and_outputs_past_31_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^27 batch rows that are one row: the last program writes the last row of each output."""
    for name in ("forward_tile", "dq_tile", "dkdv_tile"):
        monkeypatch.setattr(door, name, lambda *_: Tile(16, 16, Config(4, 1)))
    grids = only_last_programs(monkeypatch, "xdist_kernels.attention.triton")
    batch = 2**27 + 3
    one = [drawn(1, 1, 1, 16, seed=i, dtype=torch.float16) for i in range(4)]
    q, k, v, dout = (x.expand(batch, 1, 1, 16) for x in one)
    zero = torch.zeros(1, dtype=torch.int64)
    options: dict[str, Any] = {
        "scale": 1.0, "spans": (zero, zero + 1, zero, zero), "k_positions": zero,
        "dtype": torch.float16,
    }  # fmt: skip
    out, lse = door.attention_forward(q, k, v, **options)
    assert out.numel() > 2**31
    assert torch.equal(out[-1], one[2][0])
    lse, delta = lse[-1:].expand(batch, 1, 1), torch.zeros(1, 1, 1).expand(batch, 1, 1)
    dq, dk, dv = door.attention_backward(q, k, v, lse, delta, dout, **options)
    assert torch.equal(dv[-1], one[3][0])
    # One key, and a delta of 0 instead of its own: dS is dP.
    for found, other in ((dq, one[1]), (dk, one[0])):
        want = (one[3] * one[2]).float().sum() * other[0].float()
        assert float((found[-1] - want).abs().max()) <= 2.0**-9 * float(want.abs().max())
    assert grids == [batch, batch, batch]
