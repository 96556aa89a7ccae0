"""Stand-ins for cuDNN, torch's flash kernel and flash-attn: their signatures, their masks, their
layouts, and what they refuse, computed in float64 and rounded as they round."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from xdist_kernels.attention import libraries, library_calls

HOPPER = libraries.Here(90, 91900, True, (2, 8), False)


def install(monkeypatch: pytest.MonkeyPatch, at: libraries.Here = HOPPER) -> list[str]:
    """Puts the stand-ins where the libraries would be; returns the list of the calls they get."""
    calls: list[str] = []
    monkeypatch.setattr(library_calls, "_aten", Aten(calls))
    monkeypatch.setattr(libraries, "here", lambda device: at)
    package, interface = ModuleType("flash_attn"), FlashAttn(calls)
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return calls


class Aten:
    """`torch.ops.aten` as library_calls.py uses it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor | None, cum_k: Tensor | None,
        max_q: int, max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *,
        scale: float, window_size_left: int, window_size_right: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("flash_sdpa forward")
        assert dropout_p == 0.0
        assert not return_debug_mask
        window = (window_size_left, 0 if is_causal else window_size_right)
        found = _forward(q, k, v, cum_q, cum_k, max_q, max_k, scale, window, 0.0)
        return *found, None, None, None

    def _flash_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        cum_q: Tensor | None, cum_k: Tensor | None, max_q: int, max_k: int, dropout_p: float,
        is_causal: bool, rng_state: Tensor, unused: Tensor, *, scale: float,
        window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append("flash_sdpa backward")
        assert rng_state.dtype == torch.uint64
        assert rng_state.shape == (2,)
        window = (window_size_left, 0 if is_causal else window_size_right)
        return _backward(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, scale, window, 0.0)

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, compute_lse: bool, dropout_p: float,
        is_causal: bool, return_debug_mask: bool, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("cudnn forward")
        assert compute_lse
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        window = _cudnn_window(q, k, is_causal)
        out, lse = _forward(q, k, v, None, None, q.shape[1], k.shape[1], scale, window, 0.0)
        return out.transpose(1, 2), lse.unsqueeze(-1), None, None, 0, 0, None, None, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        seed: Tensor, offset: Tensor, bias: None, cum_q: None, cum_k: None, max_q: int, max_k: int,
        dropout_p: float, is_causal: bool, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append("cudnn backward")
        assert seed.dtype == offset.dtype == torch.int64
        assert out.stride() == dout.stride()
        # Its strides of out and dout are those that were first met with the strides of q.
        orders = [sorted(range(4), key=x.stride().__getitem__) for x in (q, out)]
        assert orders[0] == orders[1]
        assert lse.shape == (*q.shape[:3], 1)
        q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
        window = _cudnn_window(q, k, is_causal)
        found = _backward(
            dout, q, k, v, out, lse[..., 0], None, None, max_q, max_k, scale, window, 0.0
        )
        return tuple(x.transpose(1, 2) for x in found)


def _cudnn_window(q: Tensor, k: Tensor, is_causal: bool) -> tuple[int, int]:
    # Its causal mask begins at the first key, that of the others ends at the last one.
    assert not is_causal or q.shape[1] == k.shape[1]
    return -1, 0 if is_causal else -1


class FlashAttn(ModuleType):
    """`flash_attn.flash_attn_interface`, version 2."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__("flash_attn.flash_attn_interface")
        self.calls = calls

    def _wrapped_flash_attn_forward(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: None, return_softmax: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("flash_attn forward")
        window = (window_size_left, 0 if causal else window_size_right)
        sizes = q.shape[1], k.shape[1]
        return *_forward(q, k, v, None, None, *sizes, softmax_scale, window, softcap), None, None

    def _wrapped_flash_attn_varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: None, return_softmax: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("flash_attn forward")
        window = (window_size_left, 0 if causal else window_size_right)
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *_forward(q, k, v, *packing, softmax_scale, window, softcap), None, None

    def _wrapped_flash_attn_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: None,
        deterministic: bool, rng_state: None,
    ) -> None:  # fmt: skip
        self.calls.append("flash_attn backward")
        window = (window_size_left, 0 if causal else window_size_right)
        sizes = q.shape[1], k.shape[1]
        found = _backward(
            dout, q, k, v, out, softmax_lse, None, None, *sizes, softmax_scale, window, softcap
        )
        for target, x in zip((dq, dk, dv), found, strict=True):
            target.copy_(x)

    def _wrapped_flash_attn_varlen_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: None, deterministic: bool, rng_state: None,
    ) -> None:  # fmt: skip
        self.calls.append("flash_attn backward")
        window = (window_size_left, 0 if causal else window_size_right)
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = _backward(dout, q, k, v, out, softmax_lse, *packing, softmax_scale, window, softcap)
        for target, x in zip((dq, dk, dv), found, strict=True):
            target.copy_(x)


def _sequences(
    q: Tensor, k: Tensor, cum_q: Tensor | None, cum_k: Tensor | None, max_q: int, max_k: int
) -> list[tuple[Any, Any]]:
    """Indices of queries and keys of each sequence, after the checks that the kernels make."""
    if cum_q is None or cum_k is None:
        assert q.dim() == 4
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        return [(i, i) for i in range(q.shape[0])]
    assert q.dim() == 3
    assert cum_q.dtype == cum_k.dtype == torch.int32
    assert cum_q.is_contiguous()
    assert cum_k.is_contiguous()
    ends = cum_q.tolist(), cum_k.tolist()
    assert ends[0][-1] == q.shape[0]
    assert ends[1][-1] == k.shape[0]
    assert max(b - a for a, b in pairwise(ends[0])) == max_q
    assert max(b - a for a, b in pairwise(ends[1])) == max_k
    runs = [[slice(a, b) for a, b in pairwise(x)] for x in ends]
    return list(zip(*runs, strict=True))


def _checked(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        # They load 16 bytes at once.
        assert x.data_ptr() % 16 == 0
        strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
        assert all(size == 1 or stride % 8 == 0 for size, stride in strides)


def _scores(
    q: Tensor, k: Tensor, scale: float, window: tuple[int, int], softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores `[H,n,m]` of q `[n,H,D]`, k `[m,H,D]`, minus infinity where unseen; their slope."""
    s = scale * torch.einsum("ihd,jhd->hij", q, k)
    slope = torch.ones_like(s)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
        slope = 1 - (s / softcap).square()
    at = torch.arange(q.shape[0]).unsqueeze(1) + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    left, right = window
    seen = torch.ones(len(at), len(key), dtype=torch.bool)
    if left >= 0:
        seen &= key >= at - left
    if right >= 0:
        seen &= key <= at + right
    return s.masked_fill(~seen, -torch.inf), slope


def _widened(x: Tensor, heads: int) -> Tensor:
    """Keys or values `[m,G,D]` in float64, each head as often as query heads read it."""
    return x.double().repeat_interleave(heads // x.shape[1], dim=1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor | None, cum_k: Tensor | None, max_q: int,
    max_k: int, scale: float, window: tuple[int, int], softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _checked(q, k, v)
    heads = q.shape[-2]
    out = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:-1], torch.nan).transpose(-1, -2).contiguous()
    for a, b in _sequences(q, k, cum_q, cum_k, max_q, max_k):
        k_, v_ = _widened(k[b], heads), _widened(v[b], heads)
        s, _ = _scores(q[a].double(), k_, scale, window, softcap)
        out[a] = torch.einsum("hij,jhe->ihe", s.softmax(-1), v_).to(q.dtype)
        (lse[:, a] if lse.dim() == 2 else lse[a]).copy_(s.logsumexp(-1))
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cum_q: Tensor | None,
    cum_k: Tensor | None, max_q: int, max_k: int, scale: float, window: tuple[int, int],
    softcap: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    _checked(dout, q, k, v, out)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    heads, groups = q.shape[-2], k.shape[-2]
    dq, dk, dv = (torch.full(x.shape, torch.nan, dtype=q.dtype) for x in (q, k, v))
    for a, b in _sequences(q, k, cum_q, cum_k, max_q, max_k):
        q_, k_, v_ = q[a].double(), _widened(k[b], heads), _widened(v[b], heads)
        do = dout[a].double()
        s, slope = _scores(q_, k_, scale, window, softcap)
        p = (s - (lse[:, a] if lse.dim() == 2 else lse[a]).double().unsqueeze(-1)).exp()
        delta = (do * out[a].double()).sum(-1).t().unsqueeze(-1)
        ds = p * (torch.einsum("ihe,jhe->hij", do, v_) - delta) * slope * scale
        dq[a] = torch.einsum("hij,jhd->ihd", ds, k_).to(q.dtype)
        found = torch.einsum("hij,ihd->jhd", ds, q_), torch.einsum("hij,ihe->jhe", p, do)
        for target, x in zip((dk, dv), found, strict=True):
            target[b] = x.unflatten(1, (groups, heads // groups)).sum(2).to(q.dtype)
    return dq, dk, dv
