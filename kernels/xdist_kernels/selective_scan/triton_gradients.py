"""Triton: every gradient of some tokens of the selective scan, from the states at their borders.

Shapes as in triton_walk.py. What comes in two, for the states and for their gradients, stands in
one tensor: borders [2, B, spans, N, channels], marks [2, B, tiles, N, channels], reach
[2, B, tiles, channels], dBC [2, channel blocks, B, N, T].
"""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.rows import lanes, row, with_row


@triton.jit
def entering(
    p_marks: tl.tensor, p_borders: tl.tensor, b_reach: tl.tensor, b_e: tl.tensor, m_c: tl.tensor
) -> tl.tensor:
    """A tile's border state [BC]: what its span makes of zero, and of the state that enters."""
    b_own = tl.load(p_marks, mask=m_c, other=0.0)
    b_given = tl.load(p_borders, mask=m_c, other=0.0)
    return b_own + tl.where(b_reach == float("inf"), 0.0, tl.exp2(b_e * b_reach) * b_given)


@triton.jit(do_not_specialize=["batch", "T", "spans", "span"])
def gradients(
    p_u: tl.tensor, p_delta: tl.tensor, p_dout: tl.tensor, p_exponents: tl.tensor, p_B: tl.tensor,
    p_C: tl.tensor, p_starts: tl.tensor, p_borders: tl.tensor, p_marks: tl.tensor,
    p_reach: tl.tensor, p_du: tl.tensor, p_ddelta: tl.tensor, p_dBC: tl.tensor,
    u_b: tl.tensor, u_t: tl.tensor, delta_b: tl.tensor, delta_t: tl.tensor, dout_b: tl.tensor,
    dout_t: tl.tensor, batch: tl.tensor, T: tl.tensor, channels: tl.tensor, spans: tl.tensor,
    span: tl.tensor, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PER: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one tile of BT tokens and one block of channels.

    for batch row, tile, block of channels:                         in parallel
        for n in 0 .. N-1:
            h, g = states at the tile's start, their gradients at its end   (marks, borders)
            a = exp2(delta exponents_n)                                     [BT, BC]
            for t in order:      s_t = a_t h (0 at a document's start);  h = s_t + delta_t u_t B_t
            for t from the last: g_t = g + C_t dout_t;  g = a_t g_t  (0 at a document's start)
            dC_t = <s_t + delta_t u_t B_t, dout_t>;  dB_t = <g_t, delta_t u_t>      over channels
            dx_t += B_t g_t;  de_t += exponents_n g_t s_t
            marks[0, tile, n] = sum of delta_t g_t s_t             the tile's part of dA
        du = delta dx;  ddelta = u dx + ln(2) de
    """
    i_p = tl.program_id(0).to(tl.int64)
    n_c = tl.cdiv(channels, BC)
    n_m = tl.cdiv(T, BT)
    rows = tl.cast(batch, tl.int64)
    i_c = i_p % n_c
    i_b = i_p // n_c // n_m
    t_0 = ((i_p // n_c) % n_m) * BT
    i_bm = i_b * n_m + t_0 // BT
    i_bs = i_b * spans + t_0 // span
    o_c = lanes(i_c * BC, BC, PER)  # [BC]
    o_r = tl.arange(0, BT)
    o_t = t_0 + o_r  # [BT]
    m_c = o_c < channels
    m_t = o_t < T
    m_tc = m_t[:, None] & m_c[None, :]

    p_d = p_delta + i_b * delta_b + o_t[:, None] * delta_t + o_c[None, :]
    b_d = tl.load(p_d, mask=m_tc, other=0.0).to(tl.float32)  # [BT, BC]
    p_x = p_u + i_b * u_b + o_t[:, None] * u_t + o_c[None, :]
    b_x = b_d * tl.load(p_x, mask=m_tc, other=0.0).to(tl.float32)
    p_dy = p_dout + i_b * dout_b + o_t[:, None] * dout_t + o_c[None, :]
    b_dy = tl.load(p_dy, mask=m_tc, other=0.0).to(tl.float32)
    b_dx = tl.zeros([BT, BC], tl.float32)
    b_de = tl.zeros([BT, BC], tl.float32)
    b_behind = tl.load(p_reach + i_bm * channels + o_c, mask=m_c, other=0.0)  # [BC]
    b_ahead = tl.load(p_reach + (rows * n_m + i_bm) * channels + o_c, mask=m_c, other=0.0)
    if p_starts is not None:
        b_starts = tl.load(p_starts + o_t).to(tl.int32)  # [BT]
    for n in range(N):
        b_e = tl.load(p_exponents + n * channels + o_c, mask=m_c, other=0.0)  # [BC]
        o_m = (i_bm * N + n) * channels + o_c
        o_s = (i_bs * N + n) * channels + o_c
        b_h = entering(p_marks + o_m, p_borders + o_s, b_behind, b_e, m_c)
        o_2 = rows * N * channels
        b_r = entering(p_marks + o_2 * n_m + o_m, p_borders + o_2 * spans + o_s, b_ahead, b_e, m_c)
        o_n = (i_bm * BT + o_r) * N + n  # [BT]
        b_b = tl.load(p_B + o_n)
        b_c = tl.load(p_C + o_n)
        b_a = tl.exp2(b_d * b_e[None, :])  # [BT, BC]
        b_in = b_x * b_b[:, None]
        b_s = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(BT):
            b_row = row(b_a, o_r, i) * b_h  # [BC]
            if p_starts is not None:
                b_row = tl.where(tl.sum(tl.where(o_r == i, b_starts, 0), 0) != 0, 0.0, b_row)
            b_s = with_row(b_s, o_r, i, b_row)
            b_h = b_row + row(b_in, o_r, i)
        p_dn = p_dBC + ((i_c * rows + i_b) * N + n) * T + o_t  # [BT]
        b_dc = tl.sum((b_s + b_in) * b_dy, 1)
        tl.store(p_dn + rows * n_c * N * T, b_dc, mask=m_t)
        b_q = b_dy * b_c[:, None]
        b_g = tl.zeros([BT, BC], tl.float32)
        for k in tl.static_range(BT):
            b_row = row(b_q, o_r, BT - 1 - k) + b_r
            b_g = with_row(b_g, o_r, BT - 1 - k, b_row)
            b_r = row(b_a, o_r, BT - 1 - k) * b_row
            if p_starts is not None:
                i_start = tl.sum(tl.where(o_r == BT - 1 - k, b_starts, 0), 0) != 0
                b_r = tl.where(i_start, 0.0, b_r)
        tl.store(p_dn, tl.sum(b_g * b_x, 1), mask=m_t)
        b_dx += b_g * b_b[:, None]
        b_w = b_g * b_s
        b_de += b_w * b_e[None, :]
        # The place was read above, maybe by another thread.
        tl.debug_barrier()
        tl.store(p_marks + o_m, tl.sum(b_w * b_d, 0), mask=m_c)
    b_u = tl.load(p_x, mask=m_tc, other=0.0).to(tl.float32)
    o_tc = (i_b * T + o_t[:, None]) * channels + o_c[None, :]
    tl.store(p_du + o_tc, b_dx * b_d, mask=m_tc)
    tl.store(p_ddelta + o_tc, b_dx * b_u + b_de * 0.6931471805599453, mask=m_tc)
