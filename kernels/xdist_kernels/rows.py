"""Rows of a block that one thread holds whole: read and written by number, without shared memory.

A block [BT, BC] with all its rows in the registers of the threads that own its channels is an array
of registers: `row(b, o_t, i)` with a constant i is a name for one of them and costs nothing. For
that the channels must be on lanes: BC is 32 * warps * PER, and `lanes` lets the compiler load no
more than PER neighbours at once (left alone, it would give a thread 16 bytes of a row and spread
the rows over lanes).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lanes(i_0: tl.tensor, BC: tl.constexpr, PER: tl.constexpr) -> tl.tensor:
    """i_0 + 0 .. BC - 1, PER neighbours to a thread: [BC], in the type of i_0."""
    # Said to be contiguous by PER, a row would lose its order as well (Triton 3.6).
    return tl.multiple_of(i_0 + tl.arange(0, BC), PER)


@triton.jit
def row(b_x: tl.tensor, o_t: tl.tensor, i: tl.constexpr) -> tl.tensor:
    """Row i of b_x [BT, BC] float32 as [BC]; o_t is 0 .. BT - 1."""
    # A sum with -0.0 is the identity in every bit, which the compiler knows; with 0.0 it is not.
    # A literal -0.0 would become 0.0.
    b_none = tl.full([1, 1], -(2**31), tl.int32).to(tl.float32, bitcast=True)
    return tl.sum(tl.where((o_t == i)[:, None], b_x, b_none), 0)


@triton.jit
def with_row(b_x: tl.tensor, o_t: tl.tensor, i: tl.constexpr, b_row: tl.tensor) -> tl.tensor:
    """b_x [BT, BC] with b_row [BC] in place of row i."""
    return tl.where((o_t == i)[:, None], b_row[None, :], b_x)
