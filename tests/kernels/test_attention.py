"""Blockwise attention against the token loop: forward, every gradient, every kind of visibility."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from xdist_kernels.attention import blocks, blockwise
from xdist_kernels.attention import torch as door
from xdist_kernels.attention.reference import attention_reference
from xdist_kernels.errors import KernelError


class Case(NamedTuple):
    """Sizes of one case; `kind` names the visibility made by `spans_of`."""

    kind: str
    batch: int = 2
    n: int = 9
    m: int = 13
    heads: int = 4
    groups: int = 2
    dim: int = 5
    value_dim: int = 3
    softcap: float | None = None
    sinks: bool = False


CASES = [
    Case("all"),
    Case("causal", groups=1),
    Case("window", groups=4, value_dim=8),
    Case("documents", sinks=True),
    Case("prefix", softcap=2.0),
    Case("per_head", softcap=1.5, sinks=True),
    Case("empty_rows"),
    Case("empty_rows", sinks=True),
    Case("all", n=1, m=1, batch=1, heads=1, groups=1),
    Case("all", m=0),
    Case("all", m=0, sinks=True),
    Case("causal", n=0),
    Case("all", heads=0, groups=0),
]


def spans_of(case: Case) -> tuple[blocks.Spans, Tensor]:
    """Spans and key positions: keys in two segments out of order, as a drawn layout holds them."""
    n, m = case.n, case.m
    keys = torch.cat([torch.arange(m // 2, m), torch.arange(0, m // 2)])
    own = torch.arange(n) + max(0, m - n)
    zero = torch.zeros(n, dtype=torch.int64)
    whole = (zero, zero + m, zero, zero)
    if case.kind == "causal":
        whole = (zero, own + 1, zero, zero)
    elif case.kind == "window":
        whole = ((own - 3).clamp(min=0), own + 2, zero, zero)
    elif case.kind == "documents":
        start = torch.where(own < 7, 0, 7)
        whole = (start, own + 1, zero, zero)
    elif case.kind == "prefix":
        whole = ((own - 1).clamp(min=3), own + 1, zero, zero + 2)
    elif case.kind == "empty_rows":
        whole = (torch.where(own % 2 == 0, own, own + 5), own + 1, zero, zero)
    elif case.kind == "per_head":
        lefts = torch.tensor([1, 100, 2, 2])[: case.heads, None]
        lo = (own[None] - lefts).clamp(min=0)
        whole = (lo, (own + 1).expand_as(lo), zero.expand_as(lo), zero.expand_as(lo))
    return whole, keys


def inputs_of(case: Case, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    made = torch.Generator().manual_seed(seed)
    shapes = [
        (case.batch, case.n, case.heads, case.dim),
        (case.batch, case.m, case.groups, case.dim),
        (case.batch, case.m, case.groups, case.value_dim),
        (case.batch, case.n, case.heads, case.value_dim),
    ]
    tensors = [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in shapes]
    sinks = torch.randn(case.heads, generator=made, dtype=torch.float64) if case.sinks else None
    return tensors, sinks


def run_both(case: Case, dtype: torch.dtype, seed: int = 0) -> list[tuple[str, Tensor, Tensor]]:
    """(name, ours, reference) of out, lse and every gradient."""
    (q, k, v, dout), sinks = inputs_of(case, seed, dtype)
    spans, keys = spans_of(case)
    options = {"scale": 0.7, "spans": spans, "k_positions": keys, "softcap": case.softcap}
    out, lse = door.attention_forward(q, k, v, sinks=sinks, **options)
    delta = door.attention_delta(out, dout)
    grads = list(door.attention_backward(q, k, v, lse, delta, dout, **options))
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        grads.append(door.sinks_backward(sinks, lse, delta))
        sinks = sinks.clone().requires_grad_()
        leaves.append(sinks)
    want, want_lse = attention_reference(*leaves[:3], sinks=sinks, **options)
    # allow_unused: a reference with no visible key never touches some inputs.
    want_grads = (
        torch.autograd.grad(want, leaves, dout.double(), allow_unused=True)
        if want.requires_grad
        else [None] * len(leaves)
    )
    pairs = [("out", out, want), ("lse", lse, want_lse)]
    for name, ours, ref, leaf in zip(
        ("dq", "dk", "dv", "dsinks"), grads, want_grads, leaves, strict=False
    ):
        pairs.append((name, ours, torch.zeros_like(leaf) if ref is None else ref))
    return pairs


def worst(pairs: list[tuple[str, Tensor, Tensor]]) -> float:
    """Largest relative error; infinities and shapes must agree exactly."""
    found = 0.0
    for name, ours, ref in pairs:
        assert ours.shape == ref.shape, name
        ref = ref.detach()
        finite = torch.isfinite(ref)
        assert torch.equal(ours[~finite].double(), ref[~finite]), name
        if finite.any():
            # Where a row sees one key dq and dk are exactly zero: no smaller scale than dv's.
            scale = ref[finite].abs().max().clamp(min=1.0 if name == "lse" else 0.5)
            error = (ours[finite].double() - ref[finite]).abs().max()
            assert not error.isnan(), name
            found = max(found, float(error / scale) if error else 0.0)
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few tokens, so that short sequences cross many of them."""
    monkeypatch.setattr(blockwise, "_KEY_TOKENS", 3)
    monkeypatch.setattr(blockwise, "_BLOCK_SCORES", 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_token_loop_in_float64(case: Case, small_blocks: None) -> None:
    assert worst(run_both(case, torch.float64)) <= 1e-12


@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_equals_the_token_loop_in_float32(case: Case) -> None:
    assert worst(run_both(case, torch.float32)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    pairs = run_both(CASES[1], dtype)
    assert all(ours.dtype == torch.float32 for _, ours, _ in pairs)
    assert worst(pairs) <= 2e-6


def test_an_empty_row_has_lse_minus_infinity_output_zero_and_zero_gradients() -> None:
    pairs = {name: ours for name, ours, _ in run_both(Case("all", m=0), torch.float32)}
    assert torch.equal(pairs["lse"], torch.full_like(pairs["lse"], -torch.inf))
    assert not pairs["out"].any()
    assert not pairs["dq"].any()


def test_large_scores_do_not_overflow() -> None:
    case = Case("causal", groups=1)
    (q, k, v, _), _ = inputs_of(case, 1, torch.float32)
    spans, keys = spans_of(case)
    options = {"scale": 300.0, "spans": spans, "k_positions": keys}
    out, lse = door.attention_forward(q, k, v, **options)
    want, want_lse = attention_reference(q, k, v, **options)
    assert worst([("lse", lse / 1e3, want_lse / 1e3)]) <= 1e-6
    assert worst([("out", out, want)]) <= 1e-3


def plan_pairs(spans: blocks.Spans, keys: Tensor) -> dict[tuple[int, int], str]:
    found = {}
    for block in blocks.plan_blocks(spans, keys, 4, 4):
        for met in block.keys:
            found[block.start, met.start] = "full" if met.full else "partial"
    return found


def test_blocks_that_see_nothing_are_skipped_and_full_ones_have_no_mask() -> None:
    own = torch.arange(16)
    zero = torch.zeros(16, dtype=torch.int64)
    found = plan_pairs((zero, own + 1, zero, zero), own)
    want = {
        (q, k): "partial" if q == k else "full" for q in range(0, 16, 4) for k in range(0, q + 1, 4)
    }
    assert found == want
    windowed = plan_pairs(((own - 3).clamp(min=0), own + 1, zero, zero), own)
    assert set(windowed) == {(0, 0), (4, 0), (4, 4), (8, 4), (8, 8), (12, 8), (12, 12)}


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "prefix", "empty_rows"])
def test_the_plan_leaves_out_only_what_nobody_sees(kind: str) -> None:
    spans, keys = spans_of(Case(kind, n=40, m=57))
    seen = blocks.visible(spans, slice(0, 40), keys)
    covered = torch.zeros_like(seen)
    for block in blocks.plan_blocks(spans, keys, 5, 7):
        for met in block.keys:
            part = (slice(block.start, block.stop), slice(met.start, met.stop))
            covered[part] = True
            assert not met.full or bool(seen[part].all())
    assert not bool((seen & ~covered).any())


def test_working_memory_is_one_block_whatever_the_length() -> None:
    """The largest tensor made inside stays the same when the sequence grows eightfold."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and func._schema.name not in ("aten::expand",):
                self.elements = max(self.elements, result.numel())
            return result

    def largest(n: int) -> int:
        q, k, v = (torch.randn(1, n, 1, 2) for _ in range(3))
        own = torch.arange(n)
        spans = (torch.zeros_like(own), own + 1, torch.zeros_like(own), torch.zeros_like(own))
        options = {"scale": 1.0, "spans": spans, "k_positions": own, "form": "blockwise"}
        with Largest() as mode:
            out, lse = door.attention_forward(q, k, v, **options)
            door.attention_backward(q, k, v, lse, (out * out).sum(-1), out, **options)
        return mode.elements

    assert largest(4096) == largest(512)


def test_strides_past_two_to_the_31_elements() -> None:
    """Keys 2^31 elements apart in memory that is never touched in between (law 8)."""
    n, step = 3, 2**30 + 8
    try:
        store = torch.empty(2 * step + 16, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.fail("4 GiB of untouched address space is needed")
    k = store.as_strided((1, n, 1, 4), (0, step, 4, 1))
    k.copy_(torch.randn(k.shape))
    q, v = torch.randn(1, n, 1, 4).bfloat16(), torch.randn(1, n, 1, 4).bfloat16()
    own, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    options = {"scale": 1.0, "spans": (zero, own + 1, zero, zero), "k_positions": own}
    far, _ = door.attention_forward(q, k, v, **options)
    near, _ = door.attention_forward(q, k.contiguous(), v, **options)
    assert torch.equal(far, near)


def test_shapes_that_do_not_fit_raise() -> None:
    (q, k, v, _), _ = inputs_of(Case("all"), 0, torch.float32)
    spans, keys = spans_of(Case("all"))
    options = {"scale": 1.0, "spans": spans, "k_positions": keys}
    with pytest.raises(KernelError, match="3 query heads do not divide into 2"):
        door.attention_forward(q[:, :, :3], k, v, **options)
    with pytest.raises(KernelError, match="one float dtype"):
        door.attention_forward(q.double(), k, v, **options)
    with pytest.raises(KernelError, match="spans are"):
        door.attention_forward(q[:, 1:], k, v, **options)
    with pytest.raises(KernelError, match="key positions"):
        door.attention_forward(q, k[:, 1:], v[:, 1:], **options)
    with pytest.raises(KernelError, match="sinks"):
        door.attention_forward(q, k, v, sinks=torch.zeros(1), **options)
