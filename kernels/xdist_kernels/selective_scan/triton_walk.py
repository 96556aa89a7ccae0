"""Triton: states, outputs and their gradients along spans of a tile, and from span to span.

A tile of T tokens is cut into spans; the spans, batch rows and blocks of channels run in parallel,
one warp each, and a program goes through its span token by token with the states of its channels in
registers: no state is exchanged between threads. Exponents come to base 2; they are at most 0 for
delta >= 0 and A <= 0, and nothing is divided.

Shapes: u, delta, dout [B, T, channels]; exponents [N, channels]; B, C float32 [B, padded, N] and
starts [padded], T filled up with zeros to whole tiles, so that their loads need no mask; states of
spans [B, spans, N, channels]; marks [B, tiles, N, channels]. A sum of delta is infinite where a
document starts among its tokens: such a run passes nothing on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.rows import lanes, row, with_row


@triton.jit(do_not_specialize=["T", "spans", "span"])
def walk(
    p_u: tl.tensor, p_delta: tl.tensor, p_exponents: tl.tensor, p_B: tl.tensor, p_C: tl.tensor,
    p_starts: tl.tensor, p_first: tl.tensor, p_out: tl.tensor, p_last: tl.tensor,
    p_sums: tl.tensor, p_marks: tl.tensor, p_reach: tl.tensor,
    u_b: tl.tensor, u_t: tl.tensor, delta_b: tl.tensor, delta_t: tl.tensor,
    T: tl.tensor, channels: tl.tensor, spans: tl.tensor, span: tl.tensor,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr,
) -> None:  # fmt: skip
    """States along a span, and what is made of them.

        for batch row, span, block of channels:                         in parallel
            h = first[span], or 0;  s = 0
            for tiles of BT tokens in order:
                marks[tile], reach[tile] = h, s
                for tokens t of the tile in order:
                    h, s = 0, inf                                 if a document starts at t
                    h = exp2(delta_t exponents) h + (delta_t u_t) B_t;  s = s + delta_t
                    out_t = <C_t, h>
            last[span], sums[span] = h, s

    starts, first, out (with C) and marks (with reach) may be None. Rows are loaded BG at a time.
    """
    i_p = tl.program_id(0).to(tl.int64)
    n_c = tl.cdiv(channels, BC)
    i_s = (i_p // n_c) % spans
    i_b = i_p // n_c // spans
    o_c = lanes((i_p % n_c) * BC, BC, 1)  # [BC]
    o_n = tl.arange(0, BN)
    o_g = tl.arange(0, BG)
    m_c = o_c < channels
    m_n = o_n < N
    m_nc = m_n[:, None] & m_c[None, :]
    o_nc = o_n[:, None] * channels + o_c[None, :]  # [BN, BC]
    i_bs = i_b * spans + i_s
    t_0 = i_s * span
    t_1 = tl.minimum(t_0 + span, T)
    padded = tl.cdiv(T, BT) * BT

    b_e = tl.load(p_exponents + o_nc, mask=m_nc, other=0.0)  # [BN, BC]
    b_h = tl.zeros([BN, BC], tl.float32)
    if p_first is not None:
        b_h = tl.load(p_first + i_bs * N * channels + o_nc, mask=m_nc, other=0.0)
    b_s = tl.zeros([BC], tl.float32)
    o_row = o_g[:, None].to(tl.int64)
    p_d = p_delta + i_b * delta_b + o_row * delta_t + o_c[None, :]  # [BG, BC]
    p_x = p_u + i_b * u_b + o_row * u_t + o_c[None, :]
    if p_out is not None:
        p_y = p_out + (i_b * T + o_row) * channels + o_c[None, :]
    for i_m in range(tl.cdiv(t_1 - t_0, BT)):
        t_m = t_0 + i_m * BT
        if p_marks is not None:
            i_bm = i_b * tl.cdiv(T, BT) + t_m // BT
            tl.store(p_marks + i_bm * N * channels + o_nc, b_h, mask=m_nc)
            tl.store(p_reach + i_bm * channels + o_c, b_s, mask=m_c)
        for i_g in range(BT // BG):
            t_g = t_m + i_g * BG
            m_gc = (o_g < (t_1 - t_g).to(tl.int32))[:, None] & m_c[None, :]
            # Tokens behind the last have delta = 0: they leave states alone.
            b_d = tl.load(p_d + t_g * delta_t, mask=m_gc, other=0.0).to(tl.float32)  # [BG, BC]
            b_x = b_d * tl.load(p_x + t_g * u_t, mask=m_gc, other=0.0).to(tl.float32)
            b_y = tl.zeros([BG, BC], tl.float32)
            o_bn = (i_b * padded + t_g) * N + o_n  # [BN]
            for i in tl.static_range(BG):
                b_b = tl.load(p_B + o_bn + i * N, mask=m_n, other=0.0)
                b_dt = row(b_d, o_g, i)  # [BC]
                if p_starts is not None:
                    # Not a product with zero: a NaN stays in its document.
                    i_start = tl.load(p_starts + t_g + i) != 0
                    b_h = tl.where(i_start, 0.0, b_h)
                    b_s = tl.where(i_start, float("inf"), b_s)
                b_h = tl.exp2(b_dt[None, :] * b_e) * b_h + row(b_x, o_g, i)[None, :] * b_b[:, None]
                b_s += b_dt
                if p_out is not None:
                    b_c = tl.load(p_C + o_bn + i * N, mask=m_n, other=0.0)
                    b_y = with_row(b_y, o_g, i, tl.sum(b_h * b_c[:, None], 0))
            if p_out is not None:
                tl.store(p_y + t_g * channels, b_y, mask=m_gc)
    tl.store(p_last + i_bs * N * channels + o_nc, b_h, mask=m_nc)
    tl.store(p_sums + i_bs * channels + o_c, b_s, mask=m_c)


@triton.jit(do_not_specialize=["T", "spans", "span"])
def walk_back(
    p_dout: tl.tensor, p_delta: tl.tensor, p_exponents: tl.tensor, p_C: tl.tensor,
    p_starts: tl.tensor, p_last: tl.tensor, p_sums: tl.tensor, p_marks: tl.tensor,
    p_reach: tl.tensor,
    dout_b: tl.tensor, dout_t: tl.tensor, delta_b: tl.tensor, delta_t: tl.tensor,
    T: tl.tensor, channels: tl.tensor, spans: tl.tensor, span: tl.tensor,
    N: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr,
) -> None:  # fmt: skip
    """What a span's outputs ask of the state before it: the transpose of `walk`.

        for batch row, span, block of channels:                         in parallel
            r = 0;  s = 0
            for tiles of BT tokens from the last:
                marks[tile], reach[tile] = r, s                 the gradient of the state behind it
                for tokens t of the tile from the last:
                    r = exp2(delta_t exponents) (r + C_t dout_t);  s = s + delta_t
                    r, s = 0, inf                                 if a document starts at t
            last[span], sums[span] = r, s

    starts and marks (with reach) may be None.
    """
    i_p = tl.program_id(0).to(tl.int64)
    n_c = tl.cdiv(channels, BC)
    i_s = (i_p // n_c) % spans
    i_b = i_p // n_c // spans
    o_c = lanes((i_p % n_c) * BC, BC, 1)  # [BC]
    o_n = tl.arange(0, BN)
    o_g = tl.arange(0, BG)
    m_c = o_c < channels
    m_n = o_n < N
    m_nc = m_n[:, None] & m_c[None, :]
    o_nc = o_n[:, None] * channels + o_c[None, :]  # [BN, BC]
    i_bs = i_b * spans + i_s
    t_0 = i_s * span
    t_1 = tl.minimum(t_0 + span, T)
    padded = tl.cdiv(T, BT) * BT

    b_e = tl.load(p_exponents + o_nc, mask=m_nc, other=0.0)  # [BN, BC]
    b_r = tl.zeros([BN, BC], tl.float32)
    b_s = tl.zeros([BC], tl.float32)
    o_row = o_g[:, None].to(tl.int64)
    p_d = p_delta + i_b * delta_b + o_row * delta_t + o_c[None, :]  # [BG, BC]
    p_dy = p_dout + i_b * dout_b + o_row * dout_t + o_c[None, :]
    n_m = tl.cdiv(t_1 - t_0, BT)
    for i_m in range(n_m):
        t_m = t_0 + (n_m - 1 - i_m) * BT
        if p_marks is not None:
            i_bm = i_b * tl.cdiv(T, BT) + t_m // BT
            tl.store(p_marks + i_bm * N * channels + o_nc, b_r, mask=m_nc)
            tl.store(p_reach + i_bm * channels + o_c, b_s, mask=m_c)
        for k_g in range(BT // BG):
            t_g = t_m + (BT // BG - 1 - k_g) * BG
            m_gc = (o_g < (t_1 - t_g).to(tl.int32))[:, None] & m_c[None, :]
            b_d = tl.load(p_d + t_g * delta_t, mask=m_gc, other=0.0).to(tl.float32)  # [BG, BC]
            b_dy = tl.load(p_dy + t_g * dout_t, mask=m_gc, other=0.0).to(tl.float32)
            o_bn = (i_b * padded + t_g) * N + o_n  # [BN]
            for k in tl.static_range(BG):
                b_c = tl.load(p_C + o_bn + (BG - 1 - k) * N, mask=m_n, other=0.0)  # [BN]
                b_dt = row(b_d, o_g, BG - 1 - k)  # [BC]
                b_r += row(b_dy, o_g, BG - 1 - k)[None, :] * b_c[:, None]
                b_r *= tl.exp2(b_dt[None, :] * b_e)
                b_s += b_dt
                if p_starts is not None:
                    i_start = tl.load(p_starts + t_g + (BG - 1 - k)) != 0
                    b_r = tl.where(i_start, 0.0, b_r)
                    b_s = tl.where(i_start, float("inf"), b_s)
    tl.store(p_last + i_bs * N * channels + o_nc, b_r, mask=m_nc)
    tl.store(p_sums + i_bs * channels + o_c, b_s, mask=m_c)


@triton.jit(do_not_specialize=["spans"])
def fold(
    p_exponents: tl.tensor, p_own: tl.tensor, p_sums: tl.tensor, p_state: tl.tensor,
    p_first: tl.tensor, p_last: tl.tensor, channels: tl.tensor, spans: tl.tensor,
    N: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, REVERSE: tl.constexpr,
) -> None:  # fmt: skip
    """The states before each span and behind the last, from what each makes of zero.

        for batch row, number n of a state, block of channels:          in parallel
            h = state
            for spans in order (REVERSE: from the last):
                first[span] = h
                h = own[span] + exp2(exponents sums[span]) h    own[span] alone if sums is inf
            last = h

    state, last [B, N, channels]; first and own [B, spans, N, channels]. Spans are loaded BG at a
    time: their memory, not the chain over them, is what takes long.
    """
    i_p = tl.program_id(0).to(tl.int64)
    n_c = tl.cdiv(channels, BC)
    i_n = (i_p // n_c) % N
    i_b = i_p // n_c // N
    o_c = lanes((i_p % n_c) * BC, BC, 1)  # [BC]
    o_g = tl.arange(0, BG)
    m_c = o_c < channels
    b_e = tl.load(p_exponents + i_n * channels + o_c, mask=m_c, other=0.0)
    b_h = tl.load(p_state + (i_b * N + i_n) * channels + o_c, mask=m_c, other=0.0)
    for j_0 in range(0, spans, BG):
        o_j = j_0 + o_g
        m_jc = (o_j < spans)[:, None] & m_c[None, :]
        o_bs = i_b * spans + (spans - 1 - o_j if REVERSE else o_j)  # [BG]
        o_h = (o_bs[:, None] * N + i_n) * channels + o_c[None, :]  # [BG, BC]
        # Behind the last span nothing is added and nothing decays.
        b_own = tl.load(p_own + o_h, mask=m_jc, other=0.0)
        b_s = tl.load(p_sums + o_bs[:, None] * channels + o_c[None, :], mask=m_jc, other=0.0)
        b_first = tl.zeros([BG, BC], tl.float32)
        for i in tl.static_range(BG):
            b_first = with_row(b_first, o_g, i, b_h)
            b_sum = row(b_s, o_g, i)  # [BC]
            b_h = tl.where(b_sum == float("inf"), 0.0, tl.exp2(b_e * b_sum) * b_h)
            b_h += row(b_own, o_g, i)
        tl.store(p_first + o_h, b_first, mask=m_jc)
    tl.store(p_last + (i_b * N + i_n) * channels + o_c, b_h, mask=m_c)
