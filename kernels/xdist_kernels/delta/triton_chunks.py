"""What every Triton kernel of the delta rule does inside a chunk: loads, decays, the inverse.

Decays are sums of logarithms to base 2, all of one sign and never a difference of sums, so that no
exponent is above 0 and none loses digits where a token decays strongly. A document that starts
inside is a decay of -inf at its first token: nothing earlier passes, and no kernel knows of it.

Shapes: C tokens of a chunk; names ending in _c index them.
"""

from __future__ import annotations

from typing import TypeAlias

import triton
import triton.language as tl

# A pointer, a number or a block.
Arg: TypeAlias = tl.tensor
LOG2E = tl.constexpr(1.4426950408889634)

# What `DECAY` of the kernels says: none, one a token, one a key dim.
NONE, SCALAR, DIAGONAL = 0, 1, 2


@triton.jit
def token_block(p_x: Arg, o_t: Arg, o_d: Arg, stride: Arg, T: Arg, D: tl.constexpr) -> Arg:
    """Rows o_t [C] and columns o_d [BD] of x, 0 outside of T and D; o_t int64."""
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_t[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@triton.jit
def store_tokens(
    p_x: Arg, b_x: Arg, o_t: Arg, o_d: Arg, stride: Arg, T: Arg, D: tl.constexpr
) -> None:
    """The same rows and columns, written."""
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(p_x + o_t[:, None] * stride + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def log_decay(p_g: Arg, p_starts: Arg, o_t: Arg, m_t: Arg, stride: Arg, C: tl.constexpr) -> Arg:
    """log2 of the decay of tokens o_t [C], 0 where m_t says no."""
    b_g = tl.zeros([C], dtype=tl.float32)
    if p_g is not None:
        b_g += tl.load(p_g + o_t * stride, mask=m_t, other=0.0).to(tl.float32) * LOG2E
    if p_starts is not None:
        m_start = tl.load(p_starts + o_t, mask=m_t, other=0) != 0
        b_g = tl.where(m_start, float("-inf"), b_g)
    return b_g


@triton.jit
def log_decay_block(
    p_g: Arg, p_starts: Arg, o_t: Arg, m_t: Arg, o_k: Arg, stride: Arg, K: tl.constexpr
) -> Arg:
    """The same for tokens o_t [C] and key dims o_k [BK]."""
    m = m_t[:, None] & (o_k < K)[None, :]
    p_block = p_g + o_t[:, None] * stride + o_k[None, :]
    b_g = tl.load(p_block, mask=m, other=0.0).to(tl.float32) * LOG2E
    if p_starts is not None:
        m_start = tl.load(p_starts + o_t, mask=m_t, other=0) != 0
        b_g = tl.where(m_start[:, None], float("-inf"), b_g)
    return b_g


@triton.jit
def between(b_g: Arg, C: tl.constexpr) -> Arg:
    """D [C, C] of a decay a token: from token j to token i, 0 for j > i; b_g [C] in log2.

    Each column is summed for itself: a difference of two sums would lose what follows a strong
    decay, and make NaN of -inf.
    """
    o_i, o_j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_sum = tl.cumsum(tl.where(o_i > o_j, b_g[:, None], 0.0), 0)  # [C, C]
    return tl.where(o_i >= o_j, tl.exp2(b_sum), 0.0)


@triton.jit
def sibling(b_g: Arg, HALF: tl.constexpr, C: tl.constexpr, BK: tl.constexpr) -> Arg:
    """For each token the sum of b_g [C, BK] over the other half of its block of 2 * HALF."""
    b_part = tl.sum(tl.reshape(b_g, [C // (2 * HALF), 2, HALF, BK]), 2)  # [blocks, 2, BK]
    m_early = tl.arange(0, 2)[None, :, None] == 0
    b_first = tl.sum(tl.where(m_early, b_part, 0.0), 1)  # [blocks, BK]
    b_second = tl.sum(tl.where(m_early, 0.0, b_part), 1)
    b_other = tl.where(m_early, b_second[:, None, :], b_first[:, None, :])
    b_other = tl.broadcast_to(b_other[:, :, None, :], [C // (2 * HALF), 2, HALF, BK])
    return tl.reshape(b_other, [C, BK])


@triton.jit
def unit_inverse(b_x: Arg, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr) -> Arg:
    """(I + x)^-1 of x [C, C], strictly lower triangular, C = 2**LEVELS.

    Y = inverses of the blocks of 16 on the diagonal:
        for j = 0 .. 14:                                all blocks at once
            Y -= x[:, j] Y[j, :]                        row j is final by then
    for half = 16, 32, .. C/2:
        Y -= Y x' Y           x' = x from first to second halves of blocks of 2 * half
    """
    NB: tl.constexpr = C // 16
    o_i, o_n = tl.arange(0, 16), tl.arange(0, NB)
    m_own = o_n[:, None, None, None] == o_n[None, None, :, None]  # [NB, 1, NB, 1]
    b_own = tl.sum(tl.where(m_own, tl.reshape(b_x, [NB, 16, NB, 16]), 0.0), 2)  # [NB, 16, 16]
    b_y = tl.zeros([NB, 16, 16], dtype=tl.float32)
    b_y += tl.where(o_i[None, :, None] == o_i[None, None, :], 1.0, 0.0)
    for j in range(15):
        b_column = tl.sum(tl.where(o_i[None, None, :] == j, b_own, 0.0), 2)  # [NB, 16]
        b_row = tl.sum(tl.where(o_i[None, :, None] == j, b_y, 0.0), 1)  # [NB, 16]
        b_y -= b_column[:, :, None] * b_row[:, None, :]
    b_inverse = tl.reshape(tl.where(m_own, b_y[:, :, None, :], 0.0), [C, C])
    o_c = tl.arange(0, C)
    for level in tl.static_range(4, LEVELS):
        m = halves_meet(o_c, 1 << level)
        b_below = tl.dot(tl.where(m, b_x, 0.0), b_inverse, input_precision=PRECISION)
        b_inverse -= tl.dot(b_inverse, b_below, input_precision=PRECISION)
    return b_inverse


@triton.jit
def halves_meet(o_c: Arg, HALF: tl.constexpr) -> Arg:
    """[C, C]: row in the second and column in the first half of one block of 2 * HALF tokens."""
    m_late = (o_c // HALF) % 2 == 1
    m_same = (o_c // (2 * HALF))[:, None] == (o_c // (2 * HALF))[None, :]
    return m_same & m_late[:, None] & ((o_c // HALF) % 2 == 0)[None, :]
