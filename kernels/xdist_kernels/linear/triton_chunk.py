"""What several Triton kernels know of one chunk: its decays to base 2, and its documents."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from xdist_kernels.linear import chunks

LOG2_E = tl.constexpr(chunks.LOG2_E)
# exp of this and of all below is 0 in float32: no log decay is stronger.
LEAST = tl.constexpr(-110.0)


@triton.jit
def load_rows(
    p_x: tl.tensor, o_t: tl.tensor, m_t: tl.tensor, o_d: tl.tensor, stride: tl.tensor,
    D: tl.constexpr,
) -> Any:  # fmt: skip
    """Tokens o_t, dims o_d of one head: [BT, BD], zero behind the last token and dim."""
    inside = m_t[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_t[:, None] * stride + o_d[None, :], mask=inside, other=0.0)


@triton.jit
def load_documents(
    ids: tl.tensor, first: tl.tensor, o_t: tl.tensor, T: tl.tensor, BT: tl.constexpr,
) -> Any:  # fmt: skip
    """Documents begun up to each token [BT], before the chunk, and at its last token."""
    b_id = tl.load(ids + tl.minimum(o_t, T - 1))
    before = tl.load(ids + first - 1, mask=first > 0, other=0)
    last = tl.load(ids + tl.minimum(first + BT, T) - 1)
    return b_id, before, last


@triton.jit
def to_base_2(b_g: tl.tensor) -> Any:
    """A log decay as a float32 exponent of 2, not below LEAST; NaN stays."""
    b_g = b_g.to(tl.float32)
    return tl.where(b_g < LEAST, LEAST, b_g) * LOG2_E


@triton.jit
def parted(b_x: tl.tensor) -> Any:
    """A float64 block as two of float32, the second what the first rounds off: of running sums,
    `(top_i - top_j) + (low_i - low_j)` has all digits, also behind a strong decay."""
    b_top = b_x.to(tl.float32)
    return b_top, (b_x - b_top.to(tl.float64)).to(tl.float32)


@triton.jit
def row_decays(
    p_g: tl.tensor, g_t: tl.tensor, p_ids: tl.tensor, first: tl.tensor, o_t: tl.tensor,
    m_t: tl.tensor, T: tl.tensor, BT: tl.constexpr, REVERSE: tl.constexpr,
) -> Any:  # fmt: skip
    """Of one decay a token, or none (p_g None): what state and chunk do to each other.

    Returns since [BT] and until [BT], the decays from the chunk's start and to its end, 0 where a
    document starts between; log, that of the whole chunk; between [BT, BT], the decays from one
    token to a later one (REVERSE: rows are the earlier ones), 0 where they do not see each other.
    """
    o_i = tl.arange(0, BT)
    ahead = o_i[:, None] - o_i[None, :]
    visible = (ahead <= 0) if REVERSE else (ahead >= 0)
    since = tl.full([BT], 1.0, tl.float32)
    until = since
    log = 0.0
    if p_ids is not None:
        b_id, before, last = load_documents(p_ids, first, o_t, T, BT)
        visible = visible & (b_id[:, None] == b_id[None, :])
    if p_g is not None:
        b_g = to_base_2(tl.load(p_g + o_t * g_t, mask=m_t, other=0.0))
        b_c, b_low = parted(tl.cumsum(b_g.to(tl.float64), 0))
        # Of the running sum itself: one added up in another order differs by a rounding of it.
        log = tl.sum(tl.where(o_i == BT - 1, b_c, 0.0), 0)
        low = tl.sum(tl.where(o_i == BT - 1, b_low, 0.0), 0)
        since = tl.exp2(b_c)
        until = tl.exp2((log - b_c) + (low - b_low))
        gap = (b_c[:, None] - b_c[None, :]) + (b_low[:, None] - b_low[None, :])
        if REVERSE:
            gap = -gap
        # Where rows do not see columns the exponent is positive and could overflow.
        between = tl.exp2(tl.where(visible, gap, float("-inf")))
    else:
        between = tl.where(visible, 1.0, 0.0)
    if p_ids is not None:
        since = tl.where(b_id == before, since, 0.0)
        until = tl.where(b_id == last, until, 0.0)
        log = tl.where(last == before, log, float("-inf"))
    return since, until, log, between
