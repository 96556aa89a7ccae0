"""The sliding-window path against the token loop, and its careful branch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from xdist_kernels.attention import window
from xdist_kernels.attention.reference import attention_reference
from xdist_kernels.errors import KernelError


class Case(NamedTuple):
    """n queries after p tokens of prefix; `size` scales the scores; `cuts`: document starts."""

    n: int
    prefix: int
    left: int
    heads: int = 2
    groups: int = 1
    size: float = 1.0
    cuts: tuple[int, ...] | None = None
    blind: tuple[int, ...] = ()


CASES = [
    Case(150, 20, 40),
    Case(150, 0, 40, heads=3, groups=3),
    Case(130, 200, 70, size=30.0),
    Case(140, 9, 33, cuts=(0, 5, 70, 71)),
    Case(140, 0, 20, size=30.0, cuts=(3, 90), blind=(0, 1, 2, 100)),
    Case(140, 4, 20, cuts=(3, 90), blind=(0, 77)),
    Case(7, 0, 500),
    Case(70, 3, 0),
    Case(1, 0, 0),
    Case(0, 4, 3),
]


def first_visible(case: Case) -> Tensor | None:
    if case.cuts is None:
        return None
    first = torch.zeros(case.n, dtype=torch.int64)
    for cut in case.cuts:
        first[cut:] = case.prefix + cut
    first[list(case.blind)] = case.prefix + case.n  # sees nothing
    return first


def tensors(case: Case, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(3)
    keys = case.prefix + case.n
    shapes = [(2, case.n, case.heads, 8), (2, keys, case.groups, 8), (2, keys, case.groups, 6)]
    shapes.append((2, case.n, case.heads, 6))
    q, k, v, dout = (torch.randn(s, generator=made, dtype=torch.float64) for s in shapes)
    return [(q * case.size).to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype)]


def errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of out, lse and each gradient against the token loop."""
    q, k, v, dout = tensors(case, dtype)
    first = first_visible(case)
    options = {"window_left": case.left, "first_visible": first}
    out, lse = window.window_attention_forward(q, k, v, **options)
    grads = window.window_attention_backward(q, k, v, out, lse, dout, **options)
    own = torch.arange(case.n) + case.prefix
    lo = (own - case.left).clamp(min=0)
    lo = lo if first is None else torch.maximum(lo, first)
    zero = torch.zeros_like(own)
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = attention_reference(
        *leaves,
        scale=8**-0.5,
        spans=(lo, own + 1, zero, zero),
        k_positions=torch.arange(case.prefix + case.n),
    )
    want_grads = (
        torch.autograd.grad(want, leaves, dout.double())
        if want.requires_grad
        else [torch.zeros_like(x) for x in leaves]
    )
    assert out.dtype == dtype
    want_lse = want_lse.detach()
    seen = torch.isfinite(want_lse)
    assert bool((lse[~seen] == -torch.inf).all())
    assert not out[~seen].any()
    found = {"lse": float((lse.double() - want_lse)[seen].abs().max()) if seen.any() else 0.0}
    for name, ours, ref in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), (want, *want_grads), strict=True
    ):
        assert ours.shape == ref.shape
        ref = ref.detach()
        gap = (ours.double() - ref).abs().max() if ours.numel() else torch.zeros(())
        assert not gap.isnan(), name
        # A window of one key has exactly zero dq and dk: measured against dv's size instead.
        size = max(float(ref.abs().max()) if ref.numel() else 0.0, 1.0)
        found[name] = float(gap) / size
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_token_loop_in_float64(case: Case) -> None:
    assert max(errors(case, torch.float64).values()) <= 1e-11


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_token_loop_in_float32(case: Case) -> None:
    limit = 2e-6 if case.size == 1.0 else 1e-4  # scores near 500 carry 2^-24 * 500 each
    assert max(errors(case, torch.float32).values()) <= limit


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_bfloat16_is_within_its_rounding(case: Case) -> None:
    found = errors(case, torch.bfloat16)
    assert max(found[name] for name in ("out", "dq", "dk", "dv")) <= 2.5e-2


def test_small_bfloat16_scores_stay_in_bfloat16() -> None:
    q, k, _, _ = tensors(Case(64, 0, 3), torch.bfloat16)
    assert window.factor_of(q * 0.1, k, None)[2] == torch.bfloat16
    assert window.factor_of(q * 10, k, None)[2] == torch.float32


def test_not_a_number_stays_visible() -> None:
    q, k, v, _ = tensors(Case(64, 0, 3), torch.float32)
    k[0, 5] = torch.nan
    out, _ = window.window_attention_forward(q, k, v, window_left=3)
    assert bool(out[0, 5:9].isnan().all())
    assert not bool(out[1].isnan().any())


def test_holes_in_the_output_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are allocated unfilled: poison them, and nothing of the poison may remain."""
    fresh = Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: object) -> Tensor:
        return fresh(self, *size, **options).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    q, k, v, _ = tensors(Case(150, 20, 40), torch.float32)
    out, lse = window.window_attention_forward(q, k, v, window_left=40)
    assert not bool(out.isnan().any() | lse.isnan().any())


def test_strides_past_two_to_the_31_elements() -> None:
    """Tokens 2^30 elements apart: the third lies past 2^31 (law 8)."""
    n, step = 3, 2**30 + 8
    store = torch.empty(2 * step + 16, dtype=torch.bfloat16)
    k = store.as_strided((1, n, 1, 4), (0, step, 4, 1))
    k.copy_(torch.randn(k.shape))
    q, v = torch.randn(1, n, 1, 4).bfloat16(), torch.randn(1, n, 1, 4).bfloat16()
    far, _ = window.window_attention_forward(q, k, v, window_left=2)
    near, _ = window.window_attention_forward(q, k.contiguous(), v, window_left=2)
    assert torch.equal(far, near)


def test_arguments_that_do_not_fit_raise() -> None:
    q, k, v, _ = tensors(Case(8, 2, 3), torch.float32)
    with pytest.raises(KernelError, match="window_left is -1"):
        window.window_attention_forward(q, k, v, window_left=-1)
    with pytest.raises(KernelError, match="do not fit"):
        window.window_attention_forward(q, k[:, :5], v[:, :5], window_left=1)
    with pytest.raises(KernelError, match="first_visible"):
        window.window_attention_forward(q, k, v, window_left=1, first_visible=torch.zeros(3))
    with pytest.raises(KernelError, match="one for all"):
        window.window_attention_forward(q.half(), k.half(), v.half(), window_left=1)
