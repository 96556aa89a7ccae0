"""Softmax attention with explicit backward, on any device: checks, then the form that serves.

A call is cut by heads that see alike and by runs of queries (forms.py), and each part is served by
    flash      torch's CPU kernel, over pieces of keys that need no mask       (pieces.py, flash.py)
    window     blocks of queries with the keys of a window that moves along    (band.py, window.py)
    blockwise  any visibility, soft-cap, dropout and device                    (blockwise.py)
`attention_forms` tells which serves what. Sums are in float32, in float64 for float64.
Shapes: B batch, n queries, m keys, H query heads, G key heads, D and E head dims.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from xdist_kernels.attention import libraries
from xdist_kernels.attention.band import backward_band, forward_band
from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.blockwise import backward_rows, forward_rows
from xdist_kernels.attention.checks import check_call, check_tensors, sum_dtype
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.attention.flash import backward_run, backward_whole, forward_run, forward_whole
from xdist_kernels.attention.forms import Cut, Parts, Served, forms_of
from xdist_kernels.errors import KernelError
from xdist_kernels.merge.torch import merge_, merge_sinks_


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    spans: Spans | None = None,
    k_positions: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: Dropped | None = None,
    form: str | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(softcap(scale * q k^T)) v` over the keys each query sees, and its log-sum-exp.

    q `[B,n,H,D]`, k `[B,m,G,D]`, v `[B,m,G,E]`, any float dtype; `k_positions` int64 `[m]` is the
    global position of each key. `spans` = (lo, hi, prefix_lo, prefix_hi), int64 `[n]`, or `[H,n]`
    when heads differ: a query sees the keys whose position is in `[lo, hi)` or in
    `[prefix_lo, prefix_hi)`, which are disjoint. `sinks` `[H]` is one extra logit per head.
    `dropout` drops probabilities (dropout.py); the log-sum-exp is that without dropout.
    `form` forces "flash", "window" or "blockwise"; None takes the fastest that serves. `into` is
    (out, lse) over other keys, float32 (float64): these keys' part is added to it, in place. `cut`
    stands for spans and positions, which are then None (forms.py).

    Returns out `[B,n,H,E]` and lse `[B,n,H]` (natural log, sink included), both float32, float64
    for float64 inputs. Raises KernelError on shapes that do not fit, or a form that cannot
    serve.
    """
    wide = check_tensors(q, k, v, sinks, dropout)
    parts = _parts(q, k, v, spans, k_positions, softcap, dropout, form, cut)
    found = _forward(q, k, v, wide, scale, parts, softcap, sinks, dropout)
    if into is None:
        return found
    merge_(*into, *found)
    return into


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    dout: Tensor,
    *,
    scale: float,
    spans: Spans | None = None,
    k_positions: Tensor | None = None,
    softcap: float | None = None,
    dropout: Dropped | None = None,
    form: str | None = None,
    out: Tensor | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq `[B,n,H,D]`, dk `[B,m,G,D]`, dv `[B,m,G,E]` of `attention_forward`.

    `lse` `[B,n,H]` as forward gave it (for a partial set of keys: that of all keys), `delta`
    `[B,n,H]` from `attention_delta`, `dout` `[B,n,H,E]`. Gradients are float32, float64 for
    float64 inputs. The sinks' gradient needs no keys: `sinks_backward`. `out` is that of which
    `delta` was made, where it is still there: a form may then make no tensor of its size, and
    `delta` may be None, to be made if it is needed.
    """
    wide = check_tensors(q, k, v, None, dropout)
    batch, n, heads, dim = q.shape
    parts, positions = _parts(q, k, v, spans, k_positions, softcap, dropout, form, cut)
    if len(parts) == 1 and parts[0].form == "flash":
        found = backward_whole(q, k, v, lse, delta, dout, out, parts[0].pieces, scale)
        if found is not None:
            return found
    if delta is None:
        if out is None:
            raise KernelError("backward needs delta, or the output to make it of")
        delta = attention_delta(out, dout)
    dq = q.new_empty(batch, n, heads, dim, dtype=wide)
    dk = q.new_zeros(batch, k.shape[2], k.shape[1], dim, dtype=wide)
    dv = q.new_zeros(batch, v.shape[2], v.shape[1], v.shape[3], dtype=wide)
    for part in parts:
        _backward_part(
            part, q, k, v, lse, delta, dout, dq, dk, dv, positions, scale, softcap, dropout
        )
    return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def attention_forms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: Spans,
    k_positions: Tensor,
    softcap: float | None = None,
    dropout: Dropped | None = None,
    form: str | None = None,
    rounded: bool = False,
) -> list[Served]:
    """Which form serves which heads and queries of this call, forward and backward, and why.

    `rounded`: as where a caller adds nothing to the results and asked for no backend; a library on
    a GPU then comes first (libraries.py: "cudnn", "flash_attn" or "flash_sdpa").
    """
    check_call(q, k, v, spans, k_positions, None, dropout)
    drops = dropout is not None and dropout.rate > 0.0
    taken = libraries.take(
        q, k, v, spans=spans, k_positions=k_positions, softcap=softcap, drops=drops,
        rounded=rounded, form=form,
    )  # fmt: skip
    if taken.name is not None:
        whole = slice(0, q.shape[2]), slice(0, k.shape[2])
        return [Served(taken.name, *whole, 0, q.shape[1], taken.why)]
    return list(forms_of(q, k, v, spans, k_positions, softcap, drops, form))


def attention_delta(out: Tensor, dout: Tensor) -> Tensor:
    """`rowsum(dO * O)` `[B,n,H]`, float32 (float64 for float64), of `[B,n,H,E]` tensors."""
    wide = sum_dtype(dout.dtype)
    return (out.to(wide) * dout.to(wide)).sum(-1)


def sinks_backward(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient `[H]` of the sinks: a sink takes `exp(sink - lse)` of a row and adds no value."""
    # A row that sees nothing beside a sink of -inf has a lse of -inf: its share is 0.
    share = torch.exp(sinks.to(lse.dtype) - lse.masked_fill(lse == -torch.inf, 0.0))
    return -(share * delta).sum(dim=(0, 1))


def _parts(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans | None, k_positions: Tensor | None,
    softcap: float | None, dropout: Dropped | None, form: str | None, cut: Cut | None,
) -> Parts:  # fmt: skip
    """How a call is cut, which says what it sees by spans and positions or by a cut."""
    if cut is None:
        if spans is None or k_positions is None:
            raise KernelError("attention needs spans and k_positions, or a cut made of them")
        tables = spans, k_positions
        cut = Cut(lambda: tables)
    return cut.parts(q, k, v, softcap, dropout is not None and dropout.rate > 0.0, form)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, wide: torch.dtype, scale: float, cut: Parts,
    softcap: float | None, sinks: Tensor | None, dropout: Dropped | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of a checked call, out and lse in the dtype `wide` of sums."""
    batch, n, heads, _ = q.shape
    parts, positions = cut
    if len(parts) == 1 and parts[0].form == "flash":
        found = forward_whole(q, k, v, parts[0].pieces, scale)
        if found is not None:
            if sinks is not None:
                merge_sinks_(*found, sinks)
            return found
    out = q.new_empty(batch, n, heads, v.shape[-1], dtype=wide)
    lse = q.new_empty(batch, n, heads, dtype=wide)
    for part in parts:
        _forward_part(part, q, k, v, out, lse, positions, scale, softcap, sinks, dropout)
    return out, lse


def _forward_part(
    part: Served, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    k_positions: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None,
    dropout: Dropped | None,
) -> None:  # fmt: skip
    """Fills what the part is of `out` and `lse`."""
    rows, hs = slice(part.start, part.stop), part.heads
    k, v = k[:, :, part.groups], v[:, :, part.groups]
    if part.form == "window" and part.band is not None:
        forward_band(q[:, :, hs], k, v, out[:, :, hs], lse[:, :, hs], part.band, scale)
    elif part.form == "flash":
        q_, out_, lse_ = q[:, rows, hs], out[:, rows, hs], lse[:, rows, hs]
        forward_run(q_, k, v, out_, lse_, part.pieces, scale)
    else:
        forward_rows(
            q[:, rows, hs], k, v, out[:, rows, hs], lse[:, rows, hs],
            *_tables_of(part, k_positions), scale, softcap, _dropped(dropout, part),
        )  # fmt: skip
    if sinks is not None:
        merge_sinks_(out[:, rows, hs], lse[:, rows, hs], sinks[hs])


def _backward_part(
    part: Served, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
    k_positions: Tensor | None, scale: float, softcap: float | None, dropout: Dropped | None,
) -> None:  # fmt: skip
    """Fills what the part is of `dq` and adds to `dk` `[B,G,m,D]`, `dv` `[B,G,m,E]`."""
    hs, gs = part.heads, part.groups
    k, v, dk, dv = k[:, :, gs], v[:, :, gs], dk[:, gs], dv[:, gs]
    q, lse, delta, dout, dq = (x[:, :, hs] for x in (q, lse, delta, dout, dq))
    if part.form == "window" and part.band is not None:
        backward_band(q, k, v, lse, delta, dout, dq, dk, dv, part.band, scale)
        return
    rows = slice(part.start, part.stop)
    q, lse, delta, dout, dq = (x[:, rows] for x in (q, lse, delta, dout, dq))
    if part.form == "flash":
        backward_run(q, k, v, lse, delta, dout, dq, dk, dv, part.pieces, scale)
    else:
        backward_rows(
            q, k, v, lse, delta, dout, dq, dk, dv, *_tables_of(part, k_positions), scale, softcap,
            _dropped(dropout, part),
        )  # fmt: skip


def _tables_of(part: Served, k_positions: Tensor | None) -> tuple[Spans, Tensor]:
    assert part.spans is not None  # the part is blockwise
    assert k_positions is not None
    return part.spans, k_positions


def _dropped(dropout: Dropped | None, part: Served) -> Dropped | None:
    """The dropout of the part's heads and queries; None where nothing can be dropped."""
    if dropout is None or dropout.rate == 0.0:
        return None
    return replace(
        dropout,
        first_head=dropout.first_head + part.heads.start,
        q_positions=dropout.q_positions[part.start : part.stop],
    )
