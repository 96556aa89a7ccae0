"""Attention's forward kernel.

    for each batch row, query head and block of ROWS queries, in parallel:     (one program)
        m, l, acc = -inf, 0, 0
        for each piece of its plan (triton_plan.py):
            for its partial blocks of KEYS keys, then for its full ones:
                S = log2(e) * softcap(scale * Q K^T);  -inf where not visible (partial blocks)
                m' = max(m, rowmax S);  P = 2^(S - m')
                l, acc = l 2^(m - m') + rowsum P,  acc 2^(m - m') + Z P V
        L = log2(l 2^m + 2^(what `into` holds) + 2^(sink))
        O = acc 2^(m - L) + 2^(into - L) O_into;  lse = ln(2) L     (empty row: O = 0, lse = -inf)

Z is dropout's 0 or 1, its scale is applied to acc at the end. Blocks of a head run one after
another, last queries first, which are the longest under a causal mask; query heads of one key head
are neighbours, so that K and V of few heads are in L2 at a time.
Tiling and online softmax: FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.attention.triton_plan import FAR
from xdist_kernels.attention.triton_scores import (
    BOTH,
    LN2,
    LOG2E,
    NONE,
    OWN,
    Arg,
    block,
    kept,
    tanh,
)


@triton.jit(
    do_not_specialize=[
        "scale", "cap", "keep_scale", "threshold", "n", "m", "n_rows", "heads", "per_group",
        "sets", "s_lb", "s_lt", "s_lh",
    ]
)  # fmt: skip
def attention_forward_kernel(
    p_q: Arg, p_k: Arg, p_v: Arg, p_out: Arg, p_lse: Arg,
    p_spans: Arg, p_at: Arg, p_visits: Arg, p_counts: Arg,
    p_sinks: Arg, p_drop_a: Arg, p_drop_c: Arg, p_drop_key: Arg,
    scale: Arg, cap: Arg, keep_scale: Arg, threshold: Arg,
    n: Arg, m: Arg, n_rows: Arg, heads: Arg, per_group: Arg, sets: Arg,
    s_qb: Arg, s_qt: Arg, s_qh: Arg, s_kb: Arg, s_kt: Arg, s_kh: Arg,
    s_vb: Arg, s_vt: Arg, s_vh: Arg, s_ob: Arg, s_ot: Arg, s_oh: Arg,
    s_lb: Arg, s_lt: Arg, s_lh: Arg,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr,
    SOFTCAP: tl.constexpr, INTO: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """out `[B,n,H,E]`, lse `[B,n,H]` of q `[B,n,H,D]`, k `[B,m,G,D]`, v `[B,m,G,E]`."""
    i_bh = (tl.program_id(0) // n_rows).to(tl.int64)
    i_row = n_rows - 1 - tl.program_id(0) % n_rows
    i_b, i_h = i_bh // heads, i_bh % heads
    i_set = i_h % sets
    o_row = i_row * ROWS + tl.arange(0, ROWS)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    m_row, m_d, m_e = o_row < n, o_d < D, o_e < E
    t_row = o_row.to(tl.int64)

    p_q += i_b * s_qb + i_h * s_qh
    b_q = tl.load(
        p_q + t_row[:, None] * s_qt + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
    )  # [ROWS, BD]
    p_k += i_b * s_kb + (i_h // per_group) * s_kh
    p_v += i_b * s_vb + (i_h // per_group) * s_vh
    p_lo = p_spans + i_set * n + o_row
    to_span = tl.cast(sets, tl.int64) * n
    b_lo = tl.load(p_lo, mask=m_row, other=FAR)  # [ROWS]
    b_hi = tl.load(p_lo + to_span, mask=m_row, other=-FAR)
    b_plo = tl.load(p_lo + 2 * to_span, mask=m_row, other=FAR)
    b_phi = tl.load(p_lo + 3 * to_span, mask=m_row, other=-FAR)
    prefixed = tl.max((b_plo < b_phi).to(tl.int32), axis=0) != 0
    b_a = tl.zeros([ROWS], tl.int32)
    b_c = tl.zeros([ROWS], tl.int32)
    if DROPOUT:
        b_a = tl.load(p_drop_a + i_bh * n + o_row, mask=m_row, other=0)
        b_c = tl.load(p_drop_c + i_bh * n + o_row, mask=m_row, other=0)

    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BE], tl.float32)
    i_plan = i_set * n_rows + i_row
    p_visit = p_visits + i_plan * (4 * MOST)
    count = tl.load(p_counts + i_plan)
    for i_piece in range(count):
        start = tl.load(p_visit + 4 * i_piece)
        full = tl.load(p_visit + 4 * i_piece + 1)
        partial = tl.load(p_visit + 4 * i_piece + 2)
        stop = tl.load(p_visit + 4 * i_piece + 3)
        # One of the first two loops is empty: a branch would hold buffers for both.
        end = full + stop - partial
        own = tl.where(prefixed, end, start)
        b_acc, b_l, b_m = _attend(
            b_acc, b_l, b_m, b_q, p_k, p_v, p_at, p_drop_key, b_lo, b_hi, b_plo, b_phi, b_a, b_c,
            start, own, full, partial - full, scale, cap, threshold,
            m, s_kt, s_vt, D, E, BD, BE, KEYS, BOTH, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
        b_acc, b_l, b_m = _attend(
            b_acc, b_l, b_m, b_q, p_k, p_v, p_at, p_drop_key, b_lo, b_hi, b_plo, b_phi, b_a, b_c,
            own, end, full, partial - full, scale, cap, threshold,
            m, s_kt, s_vt, D, E, BD, BE, KEYS, OWN, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
        b_acc, b_l, b_m = _attend(
            b_acc, b_l, b_m, b_q, p_k, p_v, p_at, p_drop_key, b_lo, b_hi, b_plo, b_phi, b_a, b_c,
            full, partial, full, 0, scale, cap, threshold,
            m, s_kt, s_vt, D, E, BD, BE, KEYS, NONE, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip

    # What is here, what `into` holds and the sink are three parts of one softmax.
    if INTO and not SINKS:
        m_row = m_row & (count > 0)  # nothing to add: nothing is read and written
    p_lse += i_b * s_lb + i_h * s_lh
    p_out += i_b * s_ob + i_h * s_oh
    p_o = p_out + t_row[:, None] * s_ot + o_e[None, :]
    m_o = m_row[:, None] & m_e[None, :]
    b_part = tl.where(b_l > 0.0, b_m + tl.log2(tl.where(b_l > 0.0, b_l, 1.0)), float("-inf"))
    b_top = b_part
    if INTO:
        b_old = tl.load(p_lse + t_row * s_lt, mask=m_row, other=0.0) * LOG2E
        b_top = tl.maximum(b_top, b_old)
    if SINKS:
        sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        b_top = tl.maximum(b_top, sink)
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.exp2(b_part - b_base)
    if INTO:
        b_sum += tl.exp2(b_old - b_base)
    if SINKS:
        b_sum += tl.exp2(sink - b_base)
    b_all = b_base + tl.log2(tl.where(b_sum > 0.0, b_sum, 1.0))  # base and 0 where nothing is seen
    b_weight = tl.exp2(b_m - b_all)
    if DROPOUT:
        b_weight *= keep_scale
    b_acc = b_acc * b_weight[:, None]
    if INTO:
        b_was = tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
        b_acc += b_was * tl.exp2(b_old - b_all)[:, None]
    if INTO:
        # Threads of several warps read a row's lse; all must have it before one of them writes it.
        tl.debug_barrier()
    tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_o)
    tl.store(p_lse + t_row * s_lt, tl.where(b_sum > 0.0, b_all * LN2, float("-inf")), mask=m_row)


@triton.jit
def _attend(
    b_acc: Arg, b_l: Arg, b_m: Arg, b_q: Arg, p_k: Arg, p_v: Arg, p_at: Arg, p_drop_key: Arg,
    b_lo: Arg, b_hi: Arg, b_plo: Arg, b_phi: Arg, b_a: Arg, b_c: Arg,
    start: Arg, stop: Arg, turn: Arg, skip: Arg, scale: Arg, cap: Arg, threshold: Arg,
    m: Arg, s_kt: Arg, s_vt: Arg,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> Arg:  # fmt: skip
    """Blocks of keys `[start, stop)`, those from `turn` on `skip` blocks further, under MASK."""
    s_kt, s_vt = tl.cast(s_kt, tl.int64), tl.cast(s_vt, tl.int64)
    o_n, o_d, o_e = tl.arange(0, KEYS), tl.arange(0, BD), tl.arange(0, BE)
    o_k = o_n[:, None] * s_kt + o_d[None, :]
    o_v = o_n[:, None] * s_vt + o_e[None, :]
    for i_visit in range(start, stop):
        i_key = i_visit
        if MASK != NONE:
            i_key = i_visit + tl.where(i_visit < turn, 0, skip)
        o_key = i_key * KEYS + o_n
        p_k_ = p_k + i_key * KEYS * s_kt
        p_v_ = p_v + i_key * KEYS * s_vt
        b_k = block(p_k_ + o_k, o_key, o_d, m, D, BD, MASK)  # [KEYS, BD]
        b_v = block(p_v_ + o_v, o_key, o_e, m, E, BE, MASK)  # [KEYS, BE]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [ROWS, KEYS]
        b_s = tanh(b_s * (scale / cap)) * (cap * LOG2E) if SOFTCAP else b_s * (scale * LOG2E)
        if MASK != NONE:
            b_at = tl.load(p_at + o_key, mask=o_key < m, other=-FAR)[None, :]
            m_seen = (b_at >= b_lo[:, None]) & (b_at < b_hi[:, None])
            if MASK == BOTH:
                m_seen = m_seen | ((b_at >= b_plo[:, None]) & (b_at < b_phi[:, None]))
            b_s = tl.where(m_seen, b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, axis=1))
        b_base = b_new
        if MASK != NONE:
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[:, None])
        b_keep = tl.exp2(b_m - b_base)
        b_l = b_l * b_keep + tl.sum(b_p, axis=1)
        if DROPOUT:
            b_word = tl.load(p_drop_key + o_key, mask=o_key < m, other=0)
            m_kept = kept(b_a[:, None], b_c[:, None], b_word[None, :], threshold)
            b_p = tl.where(m_kept, b_p, 0.0)
        b_acc = tl.dot(
            b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision=PRECISION
        )  # [ROWS, BE]
        b_m = b_new
    return b_acc, b_l, b_m
