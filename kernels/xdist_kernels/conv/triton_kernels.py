"""Triton: the causal depthwise convolution of a run, forward, and every gradient in one pass.

Shapes: x, y, dout, dx [B, T, channels]; weight [channels, W]; prefix, dprefix [B, W - 1, channels];
into [T], tokens of its document before each token. Channels lie side by side, other strides are
free.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.rows import lanes, row, with_row


@triton.jit
def sigmoid(b_z: tl.tensor) -> tl.tensor:
    """1 / (1 + e^-z), float32; 0 where e^-z is infinite."""
    # exp2 is one instruction, exp three more for results below 2^-126.
    return 1.0 / (1.0 + tl.exp2(b_z * -1.4426950408889634))


@triton.jit
def history(
    p_x: tl.tensor, p_prefix: tl.tensor, x_t: tl.tensor, prefix_t: tl.tensor, t_0: tl.tensor,
    m_c: tl.tensor, W: tl.constexpr, P: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The P tokens before token t_0, of the run or of its prefix, [P, BC] float32; the first
    P - (W - 1) of them are never used. p_x, p_prefix [1, BC]: channels of this batch row."""
    o_b = t_0 - P + tl.arange(0, P)  # [P]
    m_b = (o_b >= 0)[:, None] & m_c[None, :]
    b_before = tl.load(p_x + o_b[:, None] * x_t, mask=m_b, other=0.0).to(tl.float32)
    # The compiler knows the first condition and not the second.
    if p_prefix is not None:  # noqa: SIM102
        if t_0 == 0:
            o_b += W - 1
            m_b = (o_b >= 0)[:, None] & m_c[None, :]
            b_before = tl.load(p_prefix + o_b[:, None] * prefix_t, mask=m_b, other=0.0)
            b_before = b_before.to(tl.float32)
    return b_before


@triton.jit
def tap(
    b_x: tl.tensor, b_before: tl.tensor, o_t: tl.tensor, o_p: tl.tensor, i: tl.constexpr,
    P: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Token i of a tile [BT, BC], or of the P tokens before it where i < 0: [BC]."""
    return row(b_x, o_t, i) if i >= 0 else row(b_before, o_p, P + i)


@triton.jit
def before_activation(
    b_x: tl.tensor, b_before: tl.tensor, b_w: tl.tensor, b_bias: tl.tensor, i_into: tl.tensor,
    o_t: tl.tensor, o_p: tl.tensor, o_w: tl.tensor, i: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """bias + sum over s of weight[:, W-1-s] x_{i-s}, taps of the token's document alone: [BC]."""
    b_z = b_bias
    for s in tl.static_range(W):
        b_tap = tap(b_x, b_before, o_t, o_p, i - s, P)
        b_z += tl.where(i_into >= s, b_tap, 0.0) * row(b_w, o_w, W - 1 - s)
    return b_z


@triton.jit
def last_rows(
    b_x: tl.tensor, b_last: tl.tensor, o_t: tl.tensor, o_p: tl.tensor, BT: tl.constexpr,
    P: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The last P rows of b_x [BT, BC], [P, BC]; b_last: any block of that shape."""
    for j in tl.static_range(P):
        b_last = with_row(b_last, o_p, j, row(b_x, o_t, BT - P + j))
    return b_last


@triton.jit(do_not_specialize=["T", "spans", "span"])
def conv_forward(
    p_x: tl.tensor, p_weight: tl.tensor, p_bias: tl.tensor, p_prefix: tl.tensor, p_into: tl.tensor,
    p_out: tl.tensor, x_b: tl.tensor, x_t: tl.tensor, prefix_b: tl.tensor, prefix_t: tl.tensor,
    out_b: tl.tensor, out_t: tl.tensor, T: tl.tensor, channels: tl.tensor, spans: tl.tensor,
    span: tl.tensor, W: tl.constexpr, P: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, PER: tl.constexpr, SILU: tl.constexpr,
) -> None:  # fmt: skip
    """Outputs of a span of tokens and one block of channels; each number is read once.

        for batch row, span, block of channels:                         in parallel
            X = the P >= W-1 tokens before the span
            for tiles of BT tokens in order:
                for tokens i of the tile:
                    z = bias + sum over s of weight[:, W-1-s] x_{i-s}   taps inside the document
                    out_i = silu(z), or z
                X = the tile's last P tokens

    The tokens before the first span are the prefix. bias, prefix (zeros) and into may be None.
    """
    i_p = tl.program_id(0).to(tl.int64)
    n_c = tl.cdiv(channels, BC)
    t_0 = ((i_p // n_c) % spans) * span
    i_b = i_p // n_c // spans
    o_c = lanes((i_p % n_c) * BC, BC, PER)  # [BC]
    o_t = tl.arange(0, BT)
    o_p = tl.arange(0, P)
    o_w = tl.arange(0, BW)
    m_c = o_c < channels
    p_x += i_b * x_b + o_c[None, :]
    p_out += i_b * out_b + o_c[None, :]
    if p_prefix is not None:
        p_prefix += i_b * prefix_b + o_c[None, :]

    m_w = (o_w < W)[:, None] & m_c[None, :]
    b_w = tl.load(p_weight + o_w[:, None] + o_c[None, :] * W, mask=m_w, other=0.0).to(tl.float32)
    b_bias = tl.zeros([BC], tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_before = history(p_x, p_prefix, x_t, prefix_t, t_0, m_c, W, P)
    for i_m in range(tl.cdiv(tl.minimum(span, T - t_0), BT)):
        t_m = t_0 + i_m * BT
        o_row = t_m + o_t[:, None]
        m_t = (o_t < T - t_m)[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_row * x_t, mask=m_t, other=0.0).to(tl.float32)  # [BT, BC]
        b_y = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(BT):
            i_into = W
            if p_into is not None:
                i_into = tl.load(p_into + t_m + i, mask=t_m + i < T, other=0)
            b_z = before_activation(b_x, b_before, b_w, b_bias, i_into, o_t, o_p, o_w, i, W, P)
            b_y = with_row(b_y, o_t, i, b_z)
        if SILU:
            b_y *= sigmoid(b_y)
        tl.store(p_out + o_row * out_t, b_y, mask=m_t)
        b_before = last_rows(b_x, b_before, o_t, o_p, BT, P)


@triton.jit
def slope(
    b_dy: tl.tensor, b_x: tl.tensor, b_before: tl.tensor, b_w: tl.tensor, b_bias: tl.tensor,
    i_into: tl.tensor, o_t: tl.tensor, o_p: tl.tensor, o_w: tl.tensor, i: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, SILU: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Gradient of token i's sum before its activation, from that of its output: [BC]."""
    b_ds = b_dy
    if SILU:
        b_z = before_activation(b_x, b_before, b_w, b_bias, i_into, o_t, o_p, o_w, i, W, P)
        b_gate = sigmoid(b_z)
        b_ds = b_dy * b_gate * (1.0 + b_z * (1.0 - b_gate))
    return b_ds


@triton.jit
def put(p_at: tl.tensor, b_new: tl.tensor, m_at: tl.tensor, ADD: tl.constexpr) -> None:
    """Stores b_new, or adds it to what is there."""
    if ADD:
        b_new += tl.load(p_at, mask=m_at, other=0.0)
    tl.store(p_at, b_new, mask=m_at)


@triton.jit(do_not_specialize=["T", "spans", "span"])
def conv_backward(
    p_x: tl.tensor, p_weight: tl.tensor, p_bias: tl.tensor, p_prefix: tl.tensor, p_into: tl.tensor,
    p_dout: tl.tensor, p_dx: tl.tensor, p_dprefix: tl.tensor, p_sums: tl.tensor,
    x_b: tl.tensor, x_t: tl.tensor, prefix_b: tl.tensor, prefix_t: tl.tensor, dout_b: tl.tensor,
    dout_t: tl.tensor, dx_b: tl.tensor, dx_t: tl.tensor, dprefix_b: tl.tensor,
    dprefix_t: tl.tensor, T: tl.tensor, channels: tl.tensor, spans: tl.tensor, span: tl.tensor,
    W: tl.constexpr, P: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    PER: tl.constexpr, SILU: tl.constexpr, ADD: tl.constexpr,
) -> None:  # fmt: skip
    """Every gradient of a span of tokens and one block of channels; each number is read once.

        for batch row, span, block of channels:                         in parallel
            X, D = the P >= W-1 tokens before the span, zeros           D: their gradients so far
            for tiles of BT tokens in order:
                for tokens i of the tile:
                    z = bias + sum over s of weight_s x_{i-s}           taps inside the document
                    d = dout_i silu'(z)
                    for s in 0 .. W-1:   dx_{i-s} += weight_s d;   dweight_s += d x_{i-s}
                    dbias += d
                write D, and dx of all tokens but the last W-1, to which later tokens add
                X, D = x, dx of the last P tokens
            the W-1 tokens behind the span:  d as above, dx_{i-s} += weight_s d for i-s in the span
            write D
            sums[span, 0 .. W-1], sums[span, W] = dweight, dbias

    The tokens before the first span are the prefix. bias, prefix (zeros) and into may be None.
    ADD: dx and dprefix are added to. sums [B, spans, W + 1, channels].
    """
    i_p = tl.program_id(0).to(tl.int64)
    n_c = tl.cdiv(channels, BC)
    i_s = (i_p // n_c) % spans
    i_b = i_p // n_c // spans
    o_c = lanes((i_p % n_c) * BC, BC, PER)  # [BC]
    o_t = tl.arange(0, BT)
    o_p = tl.arange(0, P)
    o_w = tl.arange(0, BW)
    m_c = o_c < channels
    t_0 = i_s * span
    n_m = tl.cdiv(tl.minimum(span, T - t_0), BT)
    p_x += i_b * x_b + o_c[None, :]
    p_dout += i_b * dout_b + o_c[None, :]
    p_dx += i_b * dx_b + o_c[None, :]
    p_dprefix += i_b * dprefix_b + o_c[None, :]
    if p_prefix is not None:
        p_prefix += i_b * prefix_b + o_c[None, :]

    m_w = (o_w < W)[:, None] & m_c[None, :]
    b_w = tl.load(p_weight + o_w[:, None] + o_c[None, :] * W, mask=m_w, other=0.0).to(tl.float32)
    b_bias = tl.zeros([BC], tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_before = history(p_x, p_prefix, x_t, prefix_t, t_0, m_c, W, P)
    b_carry = tl.zeros([P, BC], tl.float32)
    b_dw = tl.zeros([BW, BC], tl.float32)
    for i_m in range(n_m):
        t_m = t_0 + i_m * BT
        m_t = (o_t < T - t_m)[:, None] & m_c[None, :]
        o_row = t_m + o_t[:, None]
        b_x = tl.load(p_x + o_row * x_t, mask=m_t, other=0.0).to(tl.float32)  # [BT, BC]
        b_dy = tl.load(p_dout + o_row * dout_t, mask=m_t, other=0.0).to(tl.float32)
        b_dx = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(BT):
            i_into = W
            if p_into is not None:
                i_into = tl.load(p_into + t_m + i, mask=t_m + i < T, other=0)
            b_ds = slope(
                row(b_dy, o_t, i), b_x, b_before, b_w, b_bias, i_into, o_t, o_p, o_w, i, W, P, SILU
            )
            for s in tl.static_range(W):
                b_d = tl.where(i_into >= s, b_ds, 0.0)
                b_part = b_d * row(b_w, o_w, W - 1 - s)
                if i - s >= 0:
                    b_dx = with_row(b_dx, o_t, i - s, row(b_dx, o_t, i - s) + b_part)
                else:
                    b_part += row(b_carry, o_p, P + i - s)
                    b_carry = with_row(b_carry, o_p, P + i - s, b_part)
                b_tap = tl.where(i_into >= s, tap(b_x, b_before, o_t, o_p, i - s, P), 0.0)
                b_part = row(b_dw, o_w, W - 1 - s) + b_ds * b_tap
                b_dw = with_row(b_dw, o_w, W - 1 - s, b_part)
            b_dw = with_row(b_dw, o_w, W, row(b_dw, o_w, W) + b_ds)
        if i_m > 0:
            m_p = (o_p >= P - (W - 1))[:, None] & m_c[None, :]
            put(p_dx + (t_m - P + o_p)[:, None] * dx_t, b_carry, m_p, ADD)
        elif i_s == 0:
            o_b = t_m - P + (W - 1) + o_p
            m_p = (o_b >= 0)[:, None] & m_c[None, :]
            put(p_dprefix + o_b[:, None] * dprefix_t, b_carry, m_p, ADD)
        put(p_dx + o_row * dx_t, b_dx, m_t & (o_t < BT - (W - 1))[:, None], ADD)
        b_before = last_rows(b_x, b_before, o_t, o_p, BT, P)
        b_carry = last_rows(b_dx, b_carry, o_t, o_p, BT, P)

    t_1 = t_0 + n_m * BT
    m_p = (o_p < T - t_1)[:, None] & m_c[None, :]
    b_x = tl.load(p_x + (t_1 + o_p)[:, None] * x_t, mask=m_p, other=0.0).to(tl.float32)  # [P, BC]
    b_dy = tl.load(p_dout + (t_1 + o_p)[:, None] * dout_t, mask=m_p, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        i_into = W
        if p_into is not None:
            i_into = tl.load(p_into + t_1 + i, mask=t_1 + i < T, other=0)
        b_ds = slope(
            row(b_dy, o_p, i), b_x, b_before, b_w, b_bias, i_into, o_p, o_p, o_w, i, W, P, SILU
        )
        for s in tl.static_range(i + 1, W):
            b_part = tl.where(i_into >= s, b_ds, 0.0) * row(b_w, o_w, W - 1 - s)
            b_part += row(b_carry, o_p, P + i - s)
            b_carry = with_row(b_carry, o_p, P + i - s, b_part)
    m_p = ((o_p >= P - (W - 1)) & (o_p < T - t_1 + P))[:, None] & m_c[None, :]
    put(p_dx + (t_1 - P + o_p)[:, None] * dx_t, b_carry, m_p, ADD)
    p_sums += (i_b * spans + i_s) * (W + 1) * channels
    m_w = (o_w <= W)[:, None] & m_c[None, :]
    tl.store(p_sums + o_w[:, None].to(tl.int64) * channels + o_c[None, :], b_dw, mask=m_w)
