"""Triton: outputs and gradients of a tile, span by span, each from the state at its border.

One kernel computes linear attention over any three tensors, forwards or backwards in time, and so
the outputs and the gradients of a tile (b <= a forward, b >= a REVERSE):

    out_a = sum over b of decay(a, b) * (x_a . y_b) * z_b,  and the state's part

    out:  x, y, z = q, k, v         state S        dq:  x, y, z = dout, v, k      state S^T
    dv:   x, y, z = k, q, dout      REVERSE, dS    dk:  x, y, z = v, dout, q      REVERSE, dS^T

Shapes: x, y [B,T,*,D1], z, r, out [B,T,*,D2], each with heads of its own that divide H; states
[B,H,borders,K,V] float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdist_kernels.launch import launch, target_of
from xdist_kernels.linear.triton_chunk import load_rows, row_decays
from xdist_kernels.linear.triton_shapes import cdiv, chunk_tokens, precision, scan_blocks
from xdist_kernels.linear.triton_states import strides


@triton.jit(do_not_specialize=["T", "span", "spans", "borders", "shift"])
def scan_spans(
    x: tl.tensor, y: tl.tensor, z: tl.tensor, r: tl.tensor, g: tl.tensor, totals: tl.tensor,
    ids: tl.tensor, inner: tl.tensor, states: tl.tensor, out: tl.tensor, own: tl.tensor,
    end: tl.tensor, x_b: tl.tensor, x_t: tl.tensor, x_h: tl.tensor, x_group: tl.tensor,
    y_b: tl.tensor, y_t: tl.tensor, y_h: tl.tensor, y_group: tl.tensor, z_b: tl.tensor,
    z_t: tl.tensor, z_h: tl.tensor, z_group: tl.tensor, r_b: tl.tensor, r_t: tl.tensor,
    r_h: tl.tensor, r_group: tl.tensor, out_b: tl.tensor, out_t: tl.tensor, out_h: tl.tensor,
    g_b: tl.tensor, g_t: tl.tensor, g_h: tl.tensor, B: tl.tensor, T: tl.tensor, H: tl.tensor,
    span: tl.tensor, spans: tl.tensor, borders: tl.tensor, shift: tl.tensor, scale: tl.tensor,
    D1: tl.constexpr, D2: tl.constexpr, BT: tl.constexpr, BD1: tl.constexpr, BD2: tl.constexpr,
    DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # S [D1, D2] = the state at the span's border (REVERSE: its gradient), of one head
    # for chunks in order (REVERSE: from the last), since and until the decays to the borders:
    #     O = X S
    #     rows     O = scale * since * O + (scale * X Y^T * between) Z;  Z = until * Z
    #              (REVERSE: until * O, and scale * since * Z)
    #     weighed  O = O + inner Z                     X and Y hold the decays and the scale
    #     columns  nothing: the state's part alone, whose decays the caller knows
    #     own = rowsum(R * O)
    #     S = exp(log) S + Y^T Z
    n_2 = tl.cdiv(D2, BD2)
    i_p = tl.program_id(0).to(tl.int64)
    i_2 = i_p % n_2
    i_h = i_p // n_2 % H
    i_s = i_p // n_2 // H % spans
    i_b = i_p // n_2 // H // spans
    i_bh = i_b * H + i_h

    o_i = tl.arange(0, BT)
    o_1 = tl.arange(0, BD1)
    o_2 = i_2 * BD2 + tl.arange(0, BD2)
    inside = (o_1 < D1)[:, None] & (o_2 < D2)[None, :]
    o_s = o_1[:, None] * (1 if TRANSPOSED else D2) + o_2[None, :] * (D1 if TRANSPOSED else 1)
    i_border = i_bh * borders + i_s + shift
    b_s = tl.load(states + i_border * D1 * D2 + o_s, mask=inside, other=0.0)  # [BD1, BD2]

    p_x = x + i_b * x_b + i_h // x_group * x_h
    p_y = y + i_b * y_b + i_h // y_group * y_h
    p_z = z + i_b * z_b + i_h // z_group * z_h
    p_out = out + i_b * out_b + i_h * out_h
    p_g = g
    if g is not None:
        p_g = g + i_b * g_b + i_h * g_h
    begin = i_s * span
    n_c = tl.cdiv(tl.minimum(span, T - begin), BT).to(tl.int32)
    for i in range(n_c):
        first = begin + (n_c - 1 - i if REVERSE else i) * BT
        o_t = first + o_i
        m_t = o_t < T
        b_x = load_rows(p_x, o_t, m_t, o_1, x_t, D1)  # [BT, BD1]
        b_y = load_rows(p_y, o_t, m_t, o_1, y_t, D1)  # [BT, BD1]
        b_z = load_rows(p_z, o_t, m_t, o_2, z_t, D2)  # [BT, BD2]
        i_chunk = i_bh * tl.cdiv(T, BT) + first // BT
        b_o = tl.dot(b_x, b_s.to(b_x.dtype), input_precision=PRECISION)  # [BT, BD2]
        if DECAY == "rows":
            since, until, log, between = row_decays(p_g, g_t, ids, first, o_t, m_t, T, BT, REVERSE)
            since = since * scale
            b_a = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION) * between * scale
            b_o = b_o * (until if REVERSE else since)[:, None]
            b_o = tl.dot(b_a.to(b_z.dtype), b_z, acc=b_o, input_precision=PRECISION)
            if g is not None or ids is not None:
                b_z = (b_z * (since if REVERSE else until)[:, None]).to(b_z.dtype)
                b_s = b_s * tl.exp2(log)
            elif REVERSE:
                b_z = (b_z * scale).to(b_z.dtype)
        elif DECAY == "weighed":
            p_a = inner + i_chunk * BT * BT + o_i[:, None] * BT + o_i[None, :]
            b_a = tl.load(p_a)  # [BT, BT]
            if REVERSE:
                b_a = tl.trans(b_a)
            b_o = tl.dot(b_a, b_z, acc=b_o, input_precision=PRECISION)
            b_log = tl.load(totals + i_chunk * D1 + o_1, mask=o_1 < D1, other=0.0)
            b_s = b_s * tl.exp2(b_log)[:, None]
        else:
            b_log = tl.load(totals + i_chunk * D2 + o_2, mask=o_2 < D2, other=0.0)
            b_s = b_s * tl.exp2(b_log)[None, :]
        m_o = m_t[:, None] & (o_2 < D2)[None, :]
        tl.store(p_out + o_t[:, None] * out_t + o_2[None, :], b_o.to(out.dtype.element_ty), m_o)
        if r is not None:
            p_r = r + i_b * r_b + i_h // r_group * r_h
            b_r = load_rows(p_r, o_t, m_t, o_2, r_t, D2)  # [BT, BD2]
            p_own = own + ((i_2 * B + i_b) * H + i_h) * T + o_t
            tl.store(p_own, tl.sum(b_r.to(tl.float32) * b_o, 1), mask=m_t)
        b_s = tl.dot(tl.trans(b_y), b_z, acc=b_s, input_precision=PRECISION)
    if end is not None:
        tl.store(end + i_bh * D1 * D2 + o_s, b_s, mask=inside)


class Decays(NamedTuple):
    """How a state decays: by `log_decay` [B,T,H,1] (or not) between documents `ids` [T], or by the
    chunks' `totals` [B,H,chunks,D1 or D2] to base 2, with what is `inner` to the chunks."""

    log_decay: Tensor | None = None
    ids: Tensor | None = None
    totals: Tensor | None = None
    inner: Tensor | None = None

    @property
    def kind(self) -> str:
        if self.totals is None:
            return "rows"
        return "columns" if self.inner is None else "weighed"


class Scan(NamedTuple):
    """Which of the four sums: the tensors above, states, and the direction of time."""

    x: Tensor
    y: Tensor
    z: Tensor
    states: Tensor  # [B, H, spans + 1, K, V], or [B, H, K, V] of a lone span
    reverse: bool
    transposed: bool  # the states are [D2, D1]


def scan(
    what: Scan,
    decays: Decays,
    *,
    heads: int,
    span: int,
    scale: float,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out [B,T,H,D2] in z's dtype, rowsum(rows * out) [blocks,B,H,T] float32 or None).

    rows [B,T,*,D2]: None leaves the second out. out: where to write it, with any strides but the
    last; end [B,H,K,V]: gets the state at the end of a lone span.
    """
    x, y, z, states, reverse, transposed = what
    batch, tokens, _, first = x.shape
    second = z.shape[3]
    spans = cdiv(tokens, span)
    blocks = scan_blocks(first, second, x, target_of(x.device))
    parts = cdiv(second, blocks.second)
    if out is None:
        out = torch.empty((batch, tokens, heads, second), dtype=z.dtype, device=z.device)
    own = None
    r_b = r_t = r_h = 0
    r_group = 1
    if rows is not None:
        own = torch.empty((parts, batch, heads, tokens), dtype=torch.float32, device=z.device)
        r_b, r_t, r_h, r_group = strides(rows, heads)
    log_decay = decays.log_decay
    g_b, g_t, g_h = (0, 0, 0) if log_decay is None else log_decay.stride()[:3]
    x_b, x_t, x_h, x_group = strides(x, heads)
    y_b, y_t, y_h, y_group = strides(y, heads)
    z_b, z_t, z_h, z_group = strides(z, heads)
    lone = states.dim() == 4
    launch(
        scan_spans, batch * heads * spans * parts, blocks.config, device=x.device,
        x=x, y=y, z=z, r=rows, g=log_decay, totals=decays.totals,
        ids=decays.ids if decays.totals is None else None, inner=decays.inner,
        states=states, out=out, own=own, end=end,
        x_b=x_b, x_t=x_t, x_h=x_h, x_group=x_group,
        y_b=y_b, y_t=y_t, y_h=y_h, y_group=y_group,
        z_b=z_b, z_t=z_t, z_h=z_h, z_group=z_group,
        r_b=r_b, r_t=r_t, r_h=r_h, r_group=r_group,
        out_b=out.stride(0), out_t=out.stride(1), out_h=out.stride(2),
        g_b=g_b, g_t=g_t, g_h=g_h, B=batch, T=tokens, H=heads, span=span, spans=spans,
        borders=1 if lone else spans + 1, shift=int(reverse and not lone), scale=scale,
        D1=first, D2=second, BT=chunk_tokens(x, max(first, second)),
        BD1=blocks.first, BD2=blocks.second,
        DECAY=decays.kind, TRANSPOSED=transposed, REVERSE=reverse, PRECISION=precision(x),
    )  # fmt: skip
    return out, own
