"""What the attention kernels share: scores in powers of two, what is seen, what is dropped.

Exponentials are powers of two: a score is multiplied by log2(e) once, with the scale, and a
log-sum-exp comes back by ln(2).
"""

from __future__ import annotations

from typing import TypeAlias

import triton
import triton.language as tl

# A pointer, a number or a block.
Arg: TypeAlias = tl.tensor
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What a loop over visits hides: nothing; what is out of the own span; out of it and the prefix.
NONE, OWN, BOTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# dropout.py's constants as signed words.
FIRST = tl.constexpr(0x7FEB352D)
SECOND = tl.constexpr(0x846CA68B - 2**32)


@triton.jit
def tanh(b_x: Arg) -> Arg:
    """tanh to about 1e-7 of its value: an odd polynomial near 0, where 1 - exp would cancel."""
    b_far = tl.exp2(tl.abs(b_x) * (-2.0 * LOG2E))
    b_far = (1.0 - b_far) / (1.0 + b_far)
    b_far = tl.where(b_x < 0.0, -b_far, b_far)
    m_near = tl.abs(b_x) < 0.3
    b_near = tl.where(m_near, b_x, 0.0)
    b_2 = b_near * b_near
    b_sum = -17.0 / 315.0 + b_2 * (62.0 / 2835.0)
    b_sum = 1.0 + b_2 * (-1.0 / 3.0 + b_2 * (2.0 / 15.0 + b_2 * b_sum))
    return tl.where(m_near, b_near * b_sum, b_far)


@triton.jit
def kept(b_a: Arg, b_c: Arg, b_key: Arg, threshold: Arg) -> Arg:
    """Which pairs dropout keeps, of the queries' words (a, c) and the keys' (dropout.py)."""
    b_x = (b_a ^ b_key) * FIRST
    # An arithmetic shift fills with the sign: the mask makes the zeros.
    b_x = b_x ^ ((b_x >> 15) & 0x1FFFF)
    b_x = (b_x + b_c) * SECOND
    return b_x >= threshold


@triton.jit
def block(
    p_x: Arg, o_row: Arg, o_d: Arg, rows: Arg,
    D: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr,
) -> Arg:  # fmt: skip
    """A block of rows; zero past the last row (under a mask) and in the columns from D to BD."""
    if MASK != NONE:
        b_x = tl.load(p_x, mask=(o_row < rows)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BD:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    return b_x
