"""Triton: linear attention from both ends of a sequence at once, and the sum of the two.

    out_a = scale * (sum over b <= a of exp(c_a - c_b) (q_a . k_b) v_b
                   + sum over b >= a of exp(e_b - e_a) (q_a . k_b) v_b)   c = cumsum(g), e = c - g

q, k and v are gone through once for the states of both directions and once for the outputs, and
each product of a query and a key is made once. Spans are short: inside one every pair of tokens is
a product, between them there are two states, S from the left and R from the right. The gradients
are sums of the same form, as in triton_scan.py. None or one decay a token (log_decay [B,T,H,1]).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdist_kernels.launch import Config, launch, target_of
from xdist_kernels.linear.triton_chunk import load_rows, parted, to_base_2
from xdist_kernels.linear.triton_shapes import (
    cdiv,
    chunk_tokens,
    precision,
    scan_blocks,
    sum_blocks,
)
from xdist_kernels.linear.triton_states import Sums, strides

# Tokens among which every pair is a product: more cost products, fewer cost states.
SPAN_TOKENS = 256


class Running(NamedTuple):
    """Of each token [B,H,T,2] float32, to base 2: c and e above, summed inside spans, each as a
    float64 parted into two; None: 0."""

    c: Tensor | None
    e: Tensor | None


@triton.jit(do_not_specialize=["T", "spans"])
def running_sums(
    g: tl.tensor, c: tl.tensor, e: tl.tensor, g_b: tl.tensor, g_t: tl.tensor, g_h: tl.tensor,
    T: tl.tensor, H: tl.tensor, spans: tl.tensor, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    # of one span of one head:  c = cumsum(g), e = c - g, to base 2, in float64
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_s = i_p // H % spans
    i_b = i_p // H // spans
    o_t = i_s * SPAN + tl.arange(0, SPAN)
    m_t = o_t < T
    b_g = tl.load(g + i_b * g_b + i_h * g_h + o_t * g_t, mask=m_t, other=0.0)
    b_g = to_base_2(b_g).to(tl.float64)
    b_c = tl.cumsum(b_g, 0)
    o_out = ((i_b * H + i_h) * T + o_t) * 2
    b_top, b_low = parted(b_c)
    tl.store(c + o_out, b_top, mask=m_t)
    tl.store(c + o_out + 1, b_low, mask=m_t)
    b_top, b_low = parted(b_c - b_g)
    tl.store(e + o_out, b_top, mask=m_t)
    tl.store(e + o_out + 1, b_low, mask=m_t)


@triton.jit
def load_sums(sums: tl.tensor, o_t: tl.tensor, m_t: tl.tensor) -> Any:
    """Both parts of the sums of tokens o_t."""
    b_top = tl.load(sums + o_t * 2, mask=m_t, other=0.0)
    return b_top, tl.load(sums + o_t * 2 + 1, mask=m_t, other=0.0)


@triton.jit
def both_decays(
    c: tl.tensor, e: tl.tensor, ids: tl.tensor, i_bh: tl.tensor, begin: tl.tensor, stop: tl.tensor,
    o_t: tl.tensor, m_t: tl.tensor, T: tl.tensor, ADJOINT: tl.constexpr,
) -> Any:  # fmt: skip
    """Decays of S and of R between a token and the border of its span that they go to, the right
    and the left one (ADJOINT: that they come from, the left and the right one); 0 where a document
    starts between."""
    of_s = tl.where(m_t, 1.0, 0.0)
    of_r = of_s
    if c is not None:
        b_c, c_low = load_sums(c, i_bh * T + o_t, m_t)
        b_e, e_low = load_sums(e, i_bh * T + o_t, m_t)
        p_total = c + (i_bh * T + stop - 1) * 2
        total = tl.load(p_total)
        low = tl.load(p_total + 1)
        of_s = tl.exp2(b_c) if ADJOINT else tl.exp2((total - b_c) + (low - c_low))
        of_r = tl.exp2((total - b_e) + (low - e_low)) if ADJOINT else tl.exp2(b_e)
    if ids is not None:
        b_id = tl.load(ids + tl.minimum(o_t, T - 1))
        if ADJOINT:
            at_left = tl.load(ids + begin - 1, mask=begin > 0, other=0)
            at_right = tl.load(ids + tl.minimum(stop, T - 1))
            of_s = tl.where(b_id == at_left, of_s, 0.0)
            of_r = tl.where(b_id == at_right, of_r, 0.0)
        else:
            of_s = tl.where(b_id == tl.load(ids + stop - 1), of_s, 0.0)
            of_r = tl.where(b_id == tl.load(ids + begin), of_r, 0.0)
    return of_s, of_r


@triton.jit(do_not_specialize=["T", "span", "spans"])
def sum_both(
    x: tl.tensor, y: tl.tensor, c: tl.tensor, e: tl.tensor, ids: tl.tensor, sums: tl.tensor,
    mirrored: tl.tensor, logs: tl.tensor, mirrored_logs: tl.tensor, x_b: tl.tensor, x_t: tl.tensor,
    x_h: tl.tensor, x_group: tl.tensor, y_b: tl.tensor, y_t: tl.tensor, y_h: tl.tensor,
    y_group: tl.tensor, T: tl.tensor, H: tl.tensor, span: tl.tensor, spans: tl.tensor,
    scale: tl.tensor, D1: tl.constexpr, D2: tl.constexpr, BT: tl.constexpr, BD1: tl.constexpr,
    BD2: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # of one span of one head:
    #     for chunks:  E += X^T (of_s * Y);  F += X^T (of_r * Y)
    #     E is what the span adds to the state behind it, F to the one before it (ADJOINT: to the
    #     gradient of S before it, and to that of R behind it, times scale)
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
    stop = tl.minimum(begin + span, T)
    b_e = tl.zeros([BD1, BD2], dtype=tl.float32)
    b_f = tl.zeros([BD1, BD2], dtype=tl.float32)
    for i in range(tl.cdiv(stop - begin, BT).to(tl.int32)):
        o_t = begin + i * BT + tl.arange(0, BT)
        m_t = o_t < stop
        b_x = tl.trans(load_rows(p_x, o_t, m_t, o_1, x_t, D1))  # [BD1, BT]
        b_y = load_rows(p_y, o_t, m_t, o_2, y_t, D2)  # [BT, BD2]
        of_s, of_r = both_decays(c, e, ids, i_bh, begin, stop, o_t, m_t, T, ADJOINT)
        b_ys = (b_y * of_s[:, None]).to(b_y.dtype)
        b_yr = (b_y * of_r[:, None]).to(b_y.dtype)
        b_e = tl.dot(b_x, b_ys, acc=b_e, input_precision=PRECISION)
        b_f = tl.dot(b_x, b_yr, acc=b_f, input_precision=PRECISION)
    if ADJOINT:
        b_e = b_e * scale
        b_f = b_f * scale
    i_bhs = i_bh * spans + i_s
    o_s = i_bhs * D1 * D2 + o_1[:, None] * D2 + o_2[None, :]
    inside = (o_1 < D1)[:, None] & (o_2 < D2)[None, :]
    tl.store(sums + o_s, b_e, mask=inside)
    tl.store(mirrored + o_s, b_f, mask=inside)
    if logs is not None:
        log = 0.0
        if c is not None:
            log = tl.load(c + (i_bh * T + stop - 1) * 2)
        mirrored_log = log
        if ids is not None:
            at_left = tl.load(ids + begin - 1, mask=begin > 0, other=0)
            at_right = tl.load(ids + tl.minimum(stop, T - 1))
            log = tl.where(tl.load(ids + stop - 1) == at_left, log, float("-inf"))
            mirrored_log = tl.where(tl.load(ids + begin) == at_right, mirrored_log, float("-inf"))
        lone = (i_1 == 0) & (i_2 == 0)
        tl.store(logs + i_bhs, log, mask=lone)
        tl.store(mirrored_logs + i_bhs, mirrored_log, mask=lone)


@triton.jit(do_not_specialize=["T", "span", "spans"])
def scan_both(
    x: tl.tensor, y: tl.tensor, z: tl.tensor, r: tl.tensor, c: tl.tensor, e: tl.tensor,
    ids: tl.tensor, states: tl.tensor, mirrored: tl.tensor, out: tl.tensor, own: tl.tensor,
    x_b: tl.tensor, x_t: tl.tensor, x_h: tl.tensor, x_group: tl.tensor, y_b: tl.tensor,
    y_t: tl.tensor, y_h: tl.tensor, y_group: tl.tensor, z_b: tl.tensor, z_t: tl.tensor,
    z_h: tl.tensor, z_group: tl.tensor, r_b: tl.tensor, r_t: tl.tensor, r_h: tl.tensor,
    r_group: tl.tensor, out_b: tl.tensor, out_t: tl.tensor, out_h: tl.tensor, B: tl.tensor,
    T: tl.tensor, H: tl.tensor, span: tl.tensor, spans: tl.tensor, scale: tl.tensor,
    D1: tl.constexpr, D2: tl.constexpr, BT: tl.constexpr, BD1: tl.constexpr, BD2: tl.constexpr,
    TRANSPOSED: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # of one chunk a of queries, S and R the states at its span's left and right border:
    #     O = of_s * (X S);  P = of_r * (X R)           of_s, of_r: the decays from the borders
    #     for chunks b of the span:
    #         O += (scale * X Y^T * exp(c_a - c_b), b <= a) Z
    #         P += (scale * X Y^T * exp(e_b - e_a), b >= a) Z
    #     out = O + P;  own = rowsum(R * O), rowsum(R * P)
    # ADJOINT: O from the right border and over b >= a, P from the left one and over b <= a
    n_2 = tl.cdiv(D2, BD2)
    n_a = tl.cdiv(span, BT)
    i_p = tl.program_id(0).to(tl.int64)
    i_2 = i_p % n_2
    i_h = i_p // n_2 % H
    i_a = i_p // n_2 // H % n_a
    i_s = i_p // n_2 // H // n_a % spans
    i_b = i_p // n_2 // H // n_a // spans
    i_bh = i_b * H + i_h

    o_i = tl.arange(0, BT)
    o_1 = tl.arange(0, BD1)
    o_2 = i_2 * BD2 + tl.arange(0, BD2)
    begin = i_s * span
    stop = tl.minimum(begin + span, T)
    o_a = begin + i_a * BT + o_i
    m_a = o_a < stop
    inside = (o_1 < D1)[:, None] & (o_2 < D2)[None, :]
    o_s = o_1[:, None] * (1 if TRANSPOSED else D2) + o_2[None, :] * (D1 if TRANSPOSED else 1)
    # S counts from the left, R from the right; their gradients the other way round.
    i_left = (i_bh * (spans + 1) + i_s) * D1 * D2
    i_right = i_left + D1 * D2
    p_s = states + (i_right if ADJOINT else i_left) + o_s
    p_r = mirrored + (i_left if ADJOINT else i_right) + o_s
    b_s = tl.load(p_s, mask=inside, other=0.0).to(x.dtype.element_ty)  # [BD1, BD2]
    b_r = tl.load(p_r, mask=inside, other=0.0).to(x.dtype.element_ty)  # [BD1, BD2]

    p_y = y + i_b * y_b + i_h // y_group * y_h
    p_z = z + i_b * z_b + i_h // z_group * z_h
    b_x = load_rows(x + i_b * x_b + i_h // x_group * x_h, o_a, m_a, o_1, x_t, D1)  # [BT, BD1]
    of_s, of_r = both_decays(c, e, ids, i_bh, begin, stop, o_a, m_a, T, not ADJOINT)
    if not ADJOINT:
        of_s = of_s * scale
        of_r = of_r * scale
    b_o = tl.dot(b_x, b_s, input_precision=PRECISION) * of_s[:, None]  # [BT, BD2]
    b_p = tl.dot(b_x, b_r, input_precision=PRECISION) * of_r[:, None]  # [BT, BD2]
    if c is not None:
        c_a, c_a_low = load_sums(c, i_bh * T + o_a, m_a)
        e_a, e_a_low = load_sums(e, i_bh * T + o_a, m_a)
    for i in range(tl.cdiv(stop - begin, BT).to(tl.int32)):
        o_b = begin + i * BT + o_i
        m_b = o_b < stop
        b_y = load_rows(p_y, o_b, m_b, o_1, y_t, D1)  # [BT, BD1]
        b_z = load_rows(p_z, o_b, m_b, o_2, z_t, D2)  # [BT, BD2]
        ahead = o_a[:, None] - o_b[None, :]
        tokens = m_a[:, None] & m_b[None, :]
        before = tokens & ((ahead <= 0) if ADJOINT else (ahead >= 0))
        behind = tokens & ((ahead >= 0) if ADJOINT else (ahead <= 0))
        if ids is not None:
            id_a = tl.load(ids + tl.minimum(o_a, T - 1))
            id_b = tl.load(ids + tl.minimum(o_b, T - 1))
            same = id_a[:, None] == id_b[None, :]
            before = before & same
            behind = behind & same
        b_f = tl.zeros([BT, BT], dtype=tl.float32)
        b_m = b_f
        if c is not None:
            c_b, c_b_low = load_sums(c, i_bh * T + o_b, m_b)
            e_b, e_b_low = load_sums(e, i_bh * T + o_b, m_b)
            b_f = (c_a[:, None] - c_b[None, :]) + (c_a_low[:, None] - c_b_low[None, :])
            b_m = (e_b[None, :] - e_a[:, None]) + (e_b_low[None, :] - e_a_low[:, None])
            b_f = b_f * (-1.0 if ADJOINT else 1.0)
            b_m = b_m * (-1.0 if ADJOINT else 1.0)
        b_f = tl.exp2(tl.where(before, b_f, float("-inf")))
        b_m = tl.exp2(tl.where(behind, b_m, float("-inf")))
        b_a = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION) * scale  # [BT, BT]
        if r is None:
            b_a = (b_a * (b_f + b_m)).to(b_z.dtype)
            b_o = tl.dot(b_a, b_z, acc=b_o, input_precision=PRECISION)
        else:
            b_o = tl.dot((b_a * b_f).to(b_z.dtype), b_z, acc=b_o, input_precision=PRECISION)
            b_p = tl.dot((b_a * b_m).to(b_z.dtype), b_z, acc=b_p, input_precision=PRECISION)
    m_o = m_a[:, None] & (o_2 < D2)[None, :]
    p_out = out + i_b * out_b + i_h * out_h + o_a[:, None] * out_t + o_2[None, :]
    tl.store(p_out, (b_o + b_p).to(out.dtype.element_ty), mask=m_o)
    if r is not None:
        b_rows = load_rows(r + i_b * r_b + i_h // r_group * r_h, o_a, m_a, o_2, r_t, D2)
        p_own = own + ((i_2 * B + i_b) * H + i_h) * T + o_a
        tl.store(p_own, tl.sum(b_rows.to(tl.float32) * b_o, 1), mask=m_a)
        p_own += n_2 * B * H * T.to(tl.int64)
        tl.store(p_own, tl.sum(b_rows.to(tl.float32) * b_p, 1), mask=m_a)


def running(log_decay: Tensor | None) -> Running:
    """The sums of log_decay [B,T,H,1] inside spans."""
    if log_decay is None:
        return Running(None, None)
    batch, tokens, heads, _ = log_decay.shape
    shape = (batch, heads, tokens, 2)
    c, e = (torch.empty(shape, dtype=torch.float32, device=log_decay.device) for _ in range(2))
    spans = cdiv(tokens, SPAN_TOKENS)
    g_b, g_t, g_h = log_decay.stride()[:3]
    launch(
        running_sums, batch * heads * spans, Config(4, 1), device=log_decay.device,
        g=log_decay, c=c, e=e, g_b=g_b, g_t=g_t, g_h=g_h, T=tokens, H=heads, spans=spans,
        SPAN=SPAN_TOKENS,
    )  # fmt: skip
    return Running(c, e)


def sums_both(
    x: Tensor,
    y: Tensor,
    decay: Running,
    ids: Tensor | None,
    *,
    heads: int,
    scale: float,
    adjoint: bool,
) -> tuple[Sums, Sums]:
    """What the spans add to S and to R (adjoint: to their gradients, times scale)."""
    batch, tokens, _, first = x.shape
    second = y.shape[3]
    spans, chunk = cdiv(tokens, SPAN_TOKENS), chunk_tokens(x, max(first, second))
    blocks = sum_blocks(first, second, x, target_of(x.device), accumulators=2)
    shape = (batch, heads, spans, first, second)
    sums, mirrored = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    logs = mirrored_logs = None
    if decay.c is not None or ids is not None:
        logs, mirrored_logs = (sums.new_empty((batch, heads, spans, 1)) for _ in range(2))
    x_b, x_t, x_h, x_group = strides(x, heads)
    y_b, y_t, y_h, y_group = strides(y, heads)
    programs = batch * heads * spans * cdiv(first, blocks.first) * cdiv(second, blocks.second)
    launch(
        sum_both, programs, blocks.config, device=x.device,
        x=x, y=y, c=decay.c, e=decay.e, ids=ids, sums=sums, mirrored=mirrored,
        logs=logs, mirrored_logs=mirrored_logs,
        x_b=x_b, x_t=x_t, x_h=x_h, x_group=x_group,
        y_b=y_b, y_t=y_t, y_h=y_h, y_group=y_group,
        T=tokens, H=heads, span=SPAN_TOKENS, spans=spans, scale=scale,
        D1=first, D2=second, BT=chunk, BD1=blocks.first, BD2=blocks.second,
        ADJOINT=adjoint, PRECISION=precision(x),
    )  # fmt: skip
    return Sums(sums, logs, SPAN_TOKENS), Sums(mirrored, mirrored_logs, SPAN_TOKENS)


class Sources(NamedTuple):
    """Which of the four sums: as in triton_scan.py, with S and R or their gradients."""

    x: Tensor
    y: Tensor
    z: Tensor
    states: Tensor  # [B, H, spans + 1, K, V] S
    mirrored: Tensor  # [B, H, spans + 1, K, V] R
    adjoint: bool
    transposed: bool


def scans_both(
    what: Sources,
    decay: Running,
    ids: Tensor | None,
    *,
    heads: int,
    scale: float,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out [B,T,H,D2], rowsum(rows * its part of each direction) [2,blocks,B,H,T] or None)."""
    x, y, z, states, mirrored, adjoint, transposed = what
    batch, tokens, _, first = x.shape
    second = z.shape[3]
    spans, chunk = cdiv(tokens, SPAN_TOKENS), chunk_tokens(x, max(first, second))
    blocks = scan_blocks(first, second, x, target_of(x.device))
    parts = cdiv(second, blocks.second)
    out = torch.empty((batch, tokens, heads, second), dtype=z.dtype, device=z.device)
    own = None
    r_b = r_t = r_h = 0
    r_group = 1
    if rows is not None:
        own = torch.empty((2, parts, batch, heads, tokens), dtype=torch.float32, device=z.device)
        r_b, r_t, r_h, r_group = strides(rows, heads)
    x_b, x_t, x_h, x_group = strides(x, heads)
    y_b, y_t, y_h, y_group = strides(y, heads)
    z_b, z_t, z_h, z_group = strides(z, heads)
    launch(
        scan_both, batch * heads * spans * parts * (SPAN_TOKENS // chunk), blocks.config,
        device=x.device, x=x, y=y, z=z, r=rows, c=decay.c, e=decay.e, ids=ids,
        states=states, mirrored=mirrored, out=out, own=own,
        x_b=x_b, x_t=x_t, x_h=x_h, x_group=x_group,
        y_b=y_b, y_t=y_t, y_h=y_h, y_group=y_group,
        z_b=z_b, z_t=z_t, z_h=z_h, z_group=z_group,
        r_b=r_b, r_t=r_t, r_h=r_h, r_group=r_group,
        out_b=out.stride(0), out_t=out.stride(1), out_h=out.stride(2),
        B=batch, T=tokens, H=heads, span=SPAN_TOKENS, spans=spans, scale=scale,
        D1=first, D2=second, BT=chunk, BD1=blocks.first, BD2=blocks.second,
        TRANSPOSED=transposed, ADJOINT=adjoint, PRECISION=precision(x),
    )  # fmt: skip
    return out, own
