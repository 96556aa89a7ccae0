"""Triton: what each span of a tile adds to the state, and the states at the spans' borders.

Shapes: x [B,T,Hx,D1], y [B,T,Hy,D2] with H % Hx == H % Hy == 0; sums [B,H,spans,D1,D2] and states
float32. Forward x is k and y is v; REVERSE, for gradients of states, x is q and y is dout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdist_kernels.launch import Config, launch, target_of
from xdist_kernels.linear.triton_chunk import load_rows, row_decays
from xdist_kernels.linear.triton_shapes import (
    cdiv,
    chunk_tokens,
    padded,
    precision,
    sum_blocks,
)


class Sums(NamedTuple):
    """What the spans of a tile do to a state: S_out = exp2(log) * S_in + entry."""

    entries: Tensor  # [B, H, spans, K, V] float32
    logs: Tensor | None  # [B, H, spans, 1 or K] float32, -inf where a document starts; None: 0
    span: int  # tokens


def strides(x: Tensor, heads: int) -> tuple[int, int, int, int]:
    """Of batch, token and head, and how many of the `heads` share one head of x."""
    return x.stride(0), x.stride(1), x.stride(2), heads // max(1, x.shape[2])


def contiguous_last(x: Tensor) -> Tensor:
    """x, or a copy where its last dim has gaps: kernels read that dim in vectors."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit(do_not_specialize=["T", "span", "spans"])
def sum_spans(
    x: tl.tensor, y: tl.tensor, g: tl.tensor, totals: tl.tensor, ids: tl.tensor, sums: tl.tensor,
    logs: tl.tensor, x_b: tl.tensor, x_t: tl.tensor, x_h: tl.tensor, x_group: tl.tensor,
    y_b: tl.tensor, y_t: tl.tensor, y_h: tl.tensor, y_group: tl.tensor, g_b: tl.tensor,
    g_t: tl.tensor, g_h: tl.tensor, T: tl.tensor, H: tl.tensor, span: tl.tensor, spans: tl.tensor,
    scale: tl.tensor, D1: tl.constexpr, D2: tl.constexpr, BT: tl.constexpr, BD1: tl.constexpr,
    BD2: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # S [D1, D2] = 0, for one span of one head:
    #     for chunks in order (REVERSE: from the last):
    #         one decay a token:  S = exp(log) S + X^T (until * Y)     REVERSE: since for until
    #         weighed chunks:     S = exp(log) S + X^T Y               X holds the decays (totals)
    #     E = scale * S
    n_1 = tl.cdiv(D1, BD1)
    n_2 = tl.cdiv(D2, BD2)
    i_p = tl.program_id(0).to(tl.int64)
    i_2 = i_p % n_2
    i_1 = i_p // n_2 % n_1
    i_h = i_p // (n_2 * n_1) % H
    i_s = i_p // (n_2 * n_1) // H % spans
    i_b = i_p // (n_2 * n_1) // H // spans
    i_bh = i_b * H + i_h

    o_1 = i_1 * BD1 + tl.arange(0, BD1)
    o_2 = i_2 * BD2 + tl.arange(0, BD2)
    p_x = x + i_b * x_b + i_h // x_group * x_h
    p_y = y + i_b * y_b + i_h // y_group * y_h
    begin = i_s * span
    n_c = tl.cdiv(tl.minimum(span, T - begin), BT).to(tl.int32)
    b_s = tl.zeros([BD1, BD2], dtype=tl.float32)
    log = 0.0
    b_log = tl.zeros([BD1], dtype=tl.float32)
    for i in range(n_c):
        first = begin + (n_c - 1 - i if REVERSE else i) * BT
        o_t = first + tl.arange(0, BT)
        m_t = o_t < T
        b_x = load_rows(p_x, o_t, m_t, o_1, x_t, D1)  # [BT, BD1]
        b_y = load_rows(p_y, o_t, m_t, o_2, y_t, D2)  # [BT, BD2]
        if totals is not None:
            p_total = totals + (i_bh * tl.cdiv(T, BT) + first // BT) * D1 + o_1
            b_total = tl.load(p_total, mask=o_1 < D1, other=0.0)  # [BD1]
            b_s = b_s * tl.exp2(b_total)[:, None]
            b_log += b_total
        elif g is not None or ids is not None:
            p_g = g
            if g is not None:
                p_g = g + i_b * g_b + i_h * g_h
            since, until, total, _ = row_decays(p_g, g_t, ids, first, o_t, m_t, T, BT, REVERSE)
            if REVERSE:
                until = since
            b_y = (b_y * until[:, None]).to(b_y.dtype)
            b_s = b_s * tl.exp2(total)
            log += total
        b_s = tl.dot(tl.trans(b_x), b_y, acc=b_s, input_precision=PRECISION)
    if REVERSE:
        b_s = b_s * scale
    i_bhs = i_bh * spans + i_s
    inside = (o_1 < D1)[:, None] & (o_2 < D2)[None, :]
    tl.store(sums + i_bhs * D1 * D2 + o_1[:, None] * D2 + o_2[None, :], b_s, mask=inside)
    if totals is not None:
        tl.store(logs + i_bhs * D1 + o_1, b_log, mask=(o_1 < D1) & (i_2 == 0))
    elif logs is not None:
        tl.store(logs + i_bhs, log, mask=(i_1 == 0) & (i_2 == 0))


@triton.jit(do_not_specialize=["spans"])
def chain_spans(
    sums: tl.tensor, logs: tl.tensor, start: tl.tensor, borders: tl.tensor, end: tl.tensor,
    spans: tl.tensor, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    KEYED: tl.constexpr, REVERSE: tl.constexpr,
) -> None:  # fmt: skip
    # S = start
    # for spans in order (REVERSE: from the last):  borders = S;  S = exp(log) S + E
    # end = S, and the last border
    n_k = tl.cdiv(K, BK)
    n_v = tl.cdiv(V, BV)
    i_p = tl.program_id(0).to(tl.int64)
    o_k = i_p // n_v % n_k * BK + tl.arange(0, BK)
    o_v = i_p % n_v * BV + tl.arange(0, BV)
    i_bh = i_p // n_v // n_k
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    b_s = tl.load(start + i_bh * K * V + o_s, mask=inside, other=0.0)  # [BK, BV]
    for i in tl.range(0, spans, num_stages=3):
        i_bhs = i_bh * spans + (spans - 1 - i if REVERSE else i)
        if borders is not None:
            # A head has one border more than spans.
            i_border = i_bhs + i_bh + (1 if REVERSE else 0)
            tl.store(borders + i_border * K * V + o_s, b_s, mask=inside)
        b_e = tl.load(sums + i_bhs * K * V + o_s, mask=inside, other=0.0)
        if logs is None:
            b_s += b_e
        elif KEYED:
            b_log = tl.load(logs + i_bhs * K + o_k, mask=o_k < K, other=0.0)
            b_s = b_s * tl.exp2(b_log)[:, None] + b_e
        else:
            b_s = b_s * tl.exp2(tl.load(logs + i_bhs)) + b_e
    if borders is not None:
        i_border = i_bh * (spans + 1) + (0 if REVERSE else spans)
        tl.store(borders + i_border * K * V + o_s, b_s, mask=inside)
    tl.store(end + i_bh * K * V + o_s, b_s, mask=inside)


def sums_of(
    x: Tensor,
    y: Tensor,
    log_decay: Tensor | None,
    totals: Tensor | None,
    ids: Tensor | None,
    *,
    heads: int,
    span: int,
    scale: float,
    reverse: bool,
) -> Sums:
    """The sums of a tile's spans, entries [B,H,spans,D1,D2].

    log_decay [B,T,H,1] or None; totals [B,H,chunks,D1] to base 2 instead where x holds the decays
    of its chunks; ids int32 [T], documents begun up to each token, or None.
    """
    batch, tokens, _, first = x.shape
    second = y.shape[3]
    spans = cdiv(tokens, span)
    blocks = sum_blocks(first, second, x, target_of(x.device))
    entries = torch.empty(
        (batch, heads, spans, first, second), dtype=torch.float32, device=x.device
    )
    logs = None
    if totals is not None:
        logs = entries.new_empty((batch, heads, spans, first))
    elif log_decay is not None or ids is not None:
        logs = entries.new_empty((batch, heads, spans, 1))
    g_b, g_t, g_h = (0, 0, 0) if log_decay is None else log_decay.stride()[:3]
    x_b, x_t, x_h, x_group = strides(x, heads)
    y_b, y_t, y_h, y_group = strides(y, heads)
    programs = batch * heads * spans * cdiv(first, blocks.first) * cdiv(second, blocks.second)
    launch(
        sum_spans, programs, blocks.config, device=x.device,
        x=x, y=y, g=log_decay, totals=totals, ids=ids if totals is None else None,
        sums=entries, logs=logs,
        x_b=x_b, x_t=x_t, x_h=x_h, x_group=x_group,
        y_b=y_b, y_t=y_t, y_h=y_h, y_group=y_group,
        g_b=g_b, g_t=g_t, g_h=g_h, T=tokens, H=heads, span=span, spans=spans, scale=scale,
        D1=first, D2=second, BT=chunk_tokens(x, max(first, second)),
        BD1=blocks.first, BD2=blocks.second,
        REVERSE=reverse, PRECISION=precision(x),
    )  # fmt: skip
    return Sums(entries, logs, span)


def chain(sums: Sums, state: Tensor, *, reverse: bool, keep: bool) -> tuple[Tensor | None, Tensor]:
    """(the states at all borders [B,H,spans+1,K,V] if they are to be kept, the one at the end).

    state [B,H,K,V]: before the tile; reverse: the gradient after it.
    """
    batch, heads, spans, key_dim, width = sums.entries.shape
    start = state.to(torch.float32).contiguous()
    end = torch.empty_like(start)
    borders = None
    if keep:
        borders = start.new_empty((batch, heads, spans + 1, key_dim, width))
    block_k, block_v = min(padded(key_dim), 32), min(padded(width), 64)
    launch(
        chain_spans, batch * heads * cdiv(key_dim, block_k) * cdiv(width, block_v), Config(4, 3),
        device=start.device,
        sums=sums.entries, logs=sums.logs, start=start, borders=borders, end=end, spans=spans,
        K=key_dim, V=width, BK=block_k, BV=block_v,
        KEYED=sums.logs is not None and sums.logs.shape[3] == key_dim, REVERSE=reverse,
    )  # fmt: skip
    return borders, end
