"""Softmax attention with explicit backward in Triton: the functions of torch.py, for CUDA devices.

Three kernels over blocks: forward (triton_forward.py), dQ and dK/dV (triton_backward*.py), each
with a plan of which blocks meet, made on the device (triton_plan.py). Sums are in float32; float32
inputs are multiplied in float32 ("ieee"), or by option as three TF32 products ("tf32x3").
Shapes: B batch, n queries, m keys, H query heads, G key heads, D and E head dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.checks import check_call
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.attention.torch import sinks_backward
from xdist_kernels.attention.triton_backward import attention_delta_kernel, attention_dq_kernel
from xdist_kernels.attention.triton_backward_keys import attention_dkdv_kernel
from xdist_kernels.attention.triton_forward import attention_forward_kernel
from xdist_kernels.attention.triton_plan import MOST, Plans
from xdist_kernels.attention.triton_tiles import (
    delta_rows,
    dkdv_tile,
    dq_tile,
    forward_tile,
    head_parts,
    padded,
)
from xdist_kernels.errors import KernelError
from xdist_kernels.launch import Config, launch, target_of, why_not

__all__ = [
    "Plans",
    "attention_backward",
    "attention_delta",
    "attention_forward",
    "refusal",
    "sinks_backward",
]

PRECISIONS = ("ieee", "tf32x3")
_MOST_TOKENS = 2**30
_MOST_DIM = 256


def refusal(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None, dropout: Dropped | None
) -> str | None:
    """Why these kernels cannot serve tensors such as these, and what to do; None: they can.

    They serve soft-cap, dropout, sinks, any spans and positions, and heads that see differently.
    """
    why = why_not(q.device, q.dtype)
    if why is not None:
        return why
    wide = max(q.shape[-1], v.shape[-1])
    if wide > _MOST_DIM:
        return f"a head dim of {wide} is above {_MOST_DIM}: use backend='torch'"
    tokens = max(q.shape[1], k.shape[1])
    if tokens > _MOST_TOKENS:
        return f"{tokens} tokens on one device are above 2**30: shard the sequence further"
    return None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    spans: Spans,
    k_positions: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: Dropped | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    plans: Plans | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """`softmax(softcap(scale * q k^T)) v` over the keys each query sees, and its log-sum-exp.

    Arguments as in `torch.attention_forward`; float32, float16 or bfloat16 inputs. `into` = (out
    `[B,n,H,E]`, lse `[B,n,H]`), both float32, of other keys: what is found here is merged into it,
    in place, and it is returned; sinks belong to one of the calls. `plans` of the same spans and
    k_positions, where the caller keeps them. `dtype` of a new `out`, float32 where None. lse is
    float32.

    Raises:
        KernelError: shapes or dtypes that do not fit, or that `refusal` names.
    """
    check_call(q, k, v, spans, k_positions, sinks, dropout)
    _check_served(q, k, v, softcap, dropout, precision)
    batch, n, heads, dim = q.shape
    value_dim = v.shape[3]
    if into is None:
        out = q.new_empty(batch, n, heads, value_dim, dtype=dtype or torch.float32)
        lse = q.new_empty(batch, n, heads, dtype=torch.float32)
    else:
        out, lse = _check_into(into, (batch, n, heads, value_dim), dtype)
    tile = forward_tile(dim, value_dim, q.dtype, target_of(q.device), precision)
    plans = plans or Plans(spans, k_positions)
    plan = plans.queries(tile.rows, tile.keys)
    q, k, v = _rows(q), _rows(k), _rows(v)
    blocks = -(-n // tile.rows)
    launch(
        attention_forward_kernel, batch * heads * blocks, tile.config, device=q.device,
        p_q=q, p_k=k, p_v=v, p_out=out, p_lse=lse,
        p_sinks=None if sinks is None else sinks.contiguous(),
        p_spans=plan.spans, p_at=plan.at, p_visits=plan.visits, p_counts=plan.counts,
        n=n, m=k.shape[1], n_rows=blocks, heads=heads, per_group=_per_group(q, k),
        sets=plan.spans.shape[1],
        s_ob=out.stride(0), s_ot=out.stride(1), s_oh=out.stride(2),
        s_lb=lse.stride(0), s_lt=lse.stride(1), s_lh=lse.stride(2),
        ROWS=tile.rows, KEYS=tile.keys, MOST=MOST, INTO=into is not None, SINKS=sinks is not None,
        **_inputs(q, k, v), **_options(scale, softcap, precision),
        **_drops(dropout, batch, heads, k_positions),
    )  # fmt: skip
    return out, lse


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    dout: Tensor,
    *,
    scale: float,
    spans: Spans,
    k_positions: Tensor,
    softcap: float | None = None,
    dropout: Dropped | None = None,
    out: Tensor | None = None,
    plans: Plans | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq `[B,n,H,D]`, dk `[B,m,G,D]`, dv `[B,m,G,E]` of `attention_forward`.

    Arguments as in `torch.attention_backward`; the gradients are float32, or `dtype`.

    Raises:
        KernelError: shapes or dtypes that do not fit, or that `refusal` names.
    """
    check_call(q, k, v, spans, k_positions, None, dropout)
    _check_served(q, k, v, softcap, dropout, precision)
    if delta is None:
        if out is None:
            raise KernelError("backward needs delta, or the output to make it of")
        delta = attention_delta(out, dout)
    batch, n, heads, _ = q.shape
    # Products take operands of one dtype: a wider dout is rounded to that of q.
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout.to(q.dtype))
    lse, delta = lse.to(torch.float32), delta.to(torch.float32)
    plans = plans or Plans(spans, k_positions)
    shared: dict[str, Any] = {
        "p_q": q, "p_k": k, "p_v": v, "p_dout": dout, "p_lse": lse, "p_delta": delta,
        "n": n, "m": k.shape[1], "heads": heads, "per_group": _per_group(q, k), "MOST": MOST,
        "s_gb": dout.stride(0), "s_gt": dout.stride(1), "s_gh": dout.stride(2),
        "s_lb": lse.stride(0), "s_lt": lse.stride(1), "s_lh": lse.stride(2),
        "s_eb": delta.stride(0), "s_et": delta.stride(1), "s_eh": delta.stride(2),
        **_inputs(q, k, v), **_options(scale, softcap, precision),
        **_drops(dropout, batch, heads, k_positions),
    }  # fmt: skip
    made = dtype or torch.float32
    dk, dv = _backward_keys(q, k, v, plans, made, shared)
    return _backward_queries(q, v, plans, made, shared), dk, dv


def _backward_queries(
    q: Tensor, v: Tensor, plans: Plans, made: torch.dtype, shared: dict[str, Any]
) -> Tensor:
    batch, n, heads, dim = q.shape
    tile = dq_tile(dim, v.shape[3], q.dtype, target_of(q.device), shared["PRECISION"])
    plan = plans.queries(tile.rows, tile.keys)
    dq = q.new_empty(batch, n, heads, dim, dtype=made)
    blocks = -(-n // tile.rows)
    launch(
        attention_dq_kernel, batch * heads * blocks, tile.config, device=q.device,
        p_dq=dq, p_spans=plan.spans, p_at=plan.at, p_visits=plan.visits, p_counts=plan.counts,
        n_rows=blocks, sets=plan.spans.shape[1], ROWS=tile.rows, KEYS=tile.keys, **shared,
    )  # fmt: skip
    return dq


def _backward_keys(
    q: Tensor, k: Tensor, v: Tensor, plans: Plans, made: torch.dtype, shared: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    batch, m, groups, dim = k.shape
    tile = dkdv_tile(dim, v.shape[3], q.dtype, target_of(q.device), shared["PRECISION"])
    plan = plans.keys(tile.rows, tile.keys)
    blocks, per_group = -(-m // tile.keys), _per_group(q, k)
    programs = batch * groups * blocks
    parts = head_parts(programs, per_group)
    # Parts are added in float32, and only there are several of them.
    wide = made if parts == 1 else torch.float32
    dk = k.new_empty(parts, batch, m, groups, dim, dtype=wide)
    dv = v.new_empty(parts, batch, m, groups, v.shape[3], dtype=wide)
    launch(
        attention_dkdv_kernel, programs * parts, tile.config, device=q.device,
        p_dk=dk, p_dv=dv, p_prefixed=plans.prefixed,
        p_spans=plan.spans, p_at=plan.at, p_visits=plan.visits, p_counts=plan.counts,
        n_keys=blocks, per_part=per_group // parts, sets=plan.spans.shape[1],
        ROWS=tile.rows, KEYS=tile.keys, **shared,
    )  # fmt: skip
    if parts == 1:
        return dk[0], dv[0]
    return dk.sum(0).to(made), dv.sum(0).to(made)


def attention_delta(out: Tensor, dout: Tensor) -> Tensor:
    """`rowsum(dO * O)` `[B,n,H]`, float32, of `[B,n,H,E]` tensors, in one pass over them."""
    if out.shape != dout.shape:
        raise KernelError(f"delta of out {tuple(out.shape)} and dout {tuple(dout.shape)}")
    batch, n, heads, dim = out.shape
    out, dout = _rows(out), _rows(dout)
    delta = out.new_empty(batch, n, heads, dtype=torch.float32)
    rows = delta_rows(dim)
    blocks = -(-n // rows)
    launch(
        attention_delta_kernel, batch * heads * blocks, Config(4, 1), device=out.device,
        p_out=out, p_dout=dout, p_delta=delta, n=n, n_rows=blocks, heads=heads,
        s_ob=out.stride(0), s_ot=out.stride(1), s_oh=out.stride(2),
        s_gb=dout.stride(0), s_gt=dout.stride(1), s_gh=dout.stride(2),
        E=dim, BE=padded(dim), ROWS=rows,
    )  # fmt: skip
    return delta


def _check_served(
    q: Tensor, k: Tensor, v: Tensor, softcap: float | None, dropout: Dropped | None, precision: str
) -> None:
    why = refusal(q, k, v, softcap=softcap, dropout=dropout)
    if why is not None:
        raise KernelError(f"attention's Triton kernels cannot serve this call\n{why}")
    if precision not in PRECISIONS:
        raise KernelError(f"no precision {precision!r}: it is one of {', '.join(PRECISIONS)}")


def _check_into(
    into: tuple[Tensor, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    out, lse = into
    if out.shape != shape or lse.shape != shape[:3]:
        given = f"{tuple(out.shape)} and {tuple(lse.shape)}"
        raise KernelError(f"`into` is out {shape} and lse {shape[:3]}: got {given}")
    if out.dtype != torch.float32 or lse.dtype != torch.float32 or dtype not in (None, out.dtype):
        raise KernelError(f"`into` is added to in float32: got {out.dtype} and {lse.dtype}")
    if out.stride(3) != 1 and out.shape[3] > 1:
        raise KernelError("`into` is written in place: its last dim must be contiguous")
    return out, lse


def _rows(x: Tensor) -> Tensor:
    """x itself where its last dim is contiguous, else a copy: kernels read whole rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_group(q: Tensor, k: Tensor) -> int:
    return q.shape[2] // max(1, k.shape[2])


def _inputs(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    return {
        "s_qb": q.stride(0), "s_qt": q.stride(1), "s_qh": q.stride(2),
        "s_kb": k.stride(0), "s_kt": k.stride(1), "s_kh": k.stride(2),
        "s_vb": v.stride(0), "s_vt": v.stride(1), "s_vh": v.stride(2),
        "D": q.shape[3], "E": v.shape[3], "BD": padded(q.shape[3]), "BE": padded(v.shape[3]),
    }  # fmt: skip


def _options(scale: float, softcap: float | None, precision: str) -> dict[str, Any]:
    return {
        "scale": float(scale), "cap": float(softcap or 1.0), "SOFTCAP": softcap is not None,
        "PRECISION": precision,
    }  # fmt: skip


def _drops(dropout: Dropped | None, batch: int, heads: int, k_positions: Tensor) -> dict[str, Any]:
    """Dropout's words int32: of queries `[B,H,n]` twice, of keys `[m]`."""
    if dropout is None or dropout.rate == 0.0:
        none = {"p_drop_a": None, "p_drop_c": None, "p_drop_key": None}
        return {**none, "keep_scale": 1.0, "threshold": 0, "DROPOUT": False}
    n = dropout.q_positions.shape[0]
    a, c = dropout.queries(batch, slice(0, heads), slice(0, n))
    return {
        "p_drop_a": a.contiguous(), "p_drop_c": c.contiguous(),
        "p_drop_key": dropout.keys(k_positions),
        "keep_scale": dropout.scale, "threshold": dropout.threshold, "DROPOUT": True,
    }  # fmt: skip
