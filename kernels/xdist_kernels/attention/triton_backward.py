"""Attention's backward kernels: one makes dQ, one dK and dV; neither adds to what another made.

    for each batch row, query head and block of ROWS queries, in parallel:     (dQ)
        for each block of KEYS keys of its plan, partial ones masked, full ones not:
            P = 2^(S - log2(e) lse);  dP = Z * dO V^T;  dS = P * (dP - delta) * softcap'
            dQ += scale * dS K
    for each batch row, key head and block of KEYS keys, in parallel:          (dK, dV)
        for each query head of the key head, in order:
            for each block of ROWS queries of its plan:
                S^T, P^T, dP^T, dS^T as above;  dV += (Z P)^T dO;  dK += scale * dS^T Q

S is made again in both: 7 products of a visited pair of blocks instead of 5, and no atomic sums, so
that the same inputs give the same bits. With the lse and delta of all keys, the gradients of a
subset of keys are that subset's part (README.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.attention.triton_plan import FAR
from xdist_kernels.attention.triton_scores import BOTH, LOG2E, NONE, OWN, Arg, block, kept, tanh


@triton.jit(do_not_specialize=["n", "n_rows", "heads"])
def attention_delta_kernel(
    p_out: Arg, p_dout: Arg, p_delta: Arg, n: Arg, n_rows: Arg, heads: Arg,
    s_ob: Arg, s_ot: Arg, s_oh: Arg, s_gb: Arg, s_gt: Arg, s_gh: Arg,
    E: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """delta `[B,n,H]` = rowsum(dO * O), blocks of one head next to those of the next head."""
    i_h = (tl.program_id(0) % heads).to(tl.int64)
    i_row = (tl.program_id(0) // heads) % n_rows
    i_b = (tl.program_id(0) // heads // n_rows).to(tl.int64)
    o_row = i_row * ROWS + tl.arange(0, ROWS)
    o_e = tl.arange(0, BE)
    m_row = o_row < n
    m_all = m_row[:, None] & (o_e < E)[None, :]
    t_row = o_row.to(tl.int64)
    p_o = p_out + i_b * s_ob + i_h * s_oh + t_row[:, None] * s_ot + o_e[None, :]
    p_g = p_dout + i_b * s_gb + i_h * s_gh + t_row[:, None] * s_gt + o_e[None, :]
    b_o = tl.load(p_o, mask=m_all, other=0.0).to(tl.float32)  # [ROWS, BE]
    b_g = tl.load(p_g, mask=m_all, other=0.0).to(tl.float32)
    p_delta += (i_b * n + t_row) * heads + i_h
    tl.store(p_delta, tl.sum(b_o * b_g, axis=1), mask=m_row)


@triton.jit(
    do_not_specialize=[
        "scale", "cap", "keep_scale", "threshold", "n", "m", "n_rows", "heads", "per_group",
        "sets", "s_lb", "s_lt", "s_lh", "s_eb", "s_et", "s_eh",
    ]
)  # fmt: skip
def attention_dq_kernel(
    p_q: Arg, p_k: Arg, p_v: Arg, p_dout: Arg, p_lse: Arg, p_delta: Arg, p_dq: Arg,
    p_spans: Arg, p_at: Arg, p_visits: Arg, p_counts: Arg,
    p_drop_a: Arg, p_drop_c: Arg, p_drop_key: Arg,
    scale: Arg, cap: Arg, keep_scale: Arg, threshold: Arg,
    n: Arg, m: Arg, n_rows: Arg, heads: Arg, per_group: Arg, sets: Arg,
    s_qb: Arg, s_qt: Arg, s_qh: Arg, s_kb: Arg, s_kt: Arg, s_kh: Arg,
    s_vb: Arg, s_vt: Arg, s_vh: Arg, s_gb: Arg, s_gt: Arg, s_gh: Arg,
    s_lb: Arg, s_lt: Arg, s_lh: Arg, s_eb: Arg, s_et: Arg, s_eh: Arg,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """dq `[B,n,H,D]`, contiguous; s_g are dout's strides, s_l lse's, s_e delta's."""
    i_bh = (tl.program_id(0) // n_rows).to(tl.int64)
    i_row = n_rows - 1 - tl.program_id(0) % n_rows
    i_b, i_h = i_bh // heads, i_bh % heads
    i_set = i_h % sets
    o_row = i_row * ROWS + tl.arange(0, ROWS)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    m_row = o_row < n
    m_q = m_row[:, None] & (o_d < D)[None, :]
    t_row = o_row.to(tl.int64)

    p_q += i_b * s_qb + i_h * s_qh
    p_dout += i_b * s_gb + i_h * s_gh
    b_q = tl.load(p_q + t_row[:, None] * s_qt + o_d[None, :], mask=m_q, other=0.0)  # [ROWS, BD]
    b_do = tl.load(
        p_dout + t_row[:, None] * s_gt + o_e[None, :],
        mask=m_row[:, None] & (o_e < E)[None, :], other=0.0,
    )  # [ROWS, BE]  # fmt: skip
    b_lse = tl.load(p_lse + i_b * s_lb + i_h * s_lh + t_row * s_lt, mask=m_row, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E)  # such a row sees nothing
    b_delta = tl.load(p_delta + i_b * s_eb + i_h * s_eh + t_row * s_et, mask=m_row, other=0.0)
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

    b_dq = tl.zeros([ROWS, BD], tl.float32)
    i_plan = i_set * n_rows + i_row
    p_visit = p_visits + i_plan * (4 * MOST)
    for i_piece in range(tl.load(p_counts + i_plan)):
        start = tl.load(p_visit + 4 * i_piece)
        full = tl.load(p_visit + 4 * i_piece + 1)
        partial = tl.load(p_visit + 4 * i_piece + 2)
        stop = tl.load(p_visit + 4 * i_piece + 3)
        # One of the first two loops is empty: a branch would hold buffers for both.
        end = full + stop - partial
        own = tl.where(prefixed, end, start)
        b_dq = _to_queries(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_at, p_drop_key,
            b_lo, b_hi, b_plo, b_phi, b_a, b_c, start, own, full, partial - full,
            scale, cap, keep_scale, threshold,
            m, s_kt, s_vt, D, E, BD, BE, KEYS, BOTH, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
        b_dq = _to_queries(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_at, p_drop_key,
            b_lo, b_hi, b_plo, b_phi, b_a, b_c, own, end, full, partial - full,
            scale, cap, keep_scale, threshold,
            m, s_kt, s_vt, D, E, BD, BE, KEYS, OWN, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
        b_dq = _to_queries(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_at, p_drop_key,
            b_lo, b_hi, b_plo, b_phi, b_a, b_c, full, partial, full, 0,
            scale, cap, keep_scale, threshold,
            m, s_kt, s_vt, D, E, BD, BE, KEYS, NONE, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
    p_dq += ((i_b * n + t_row) * heads + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_q)


@triton.jit
def _to_queries(
    b_dq: Arg, b_q: Arg, b_do: Arg, b_lse: Arg, b_delta: Arg, p_k: Arg, p_v: Arg, p_at: Arg,
    p_drop_key: Arg, b_lo: Arg, b_hi: Arg, b_plo: Arg, b_phi: Arg,
    b_a: Arg, b_c: Arg, start: Arg, stop: Arg, turn: Arg, skip: Arg,
    scale: Arg, cap: Arg, keep_scale: Arg, threshold: Arg, m: Arg, s_kt: Arg, s_vt: Arg,
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
        if SOFTCAP:
            b_s = tanh(b_s * (scale / cap))
            b_slope = 1.0 - b_s * b_s
            b_s = b_s * (cap * LOG2E)
        else:
            b_s = b_s * (scale * LOG2E)
        if MASK != NONE:
            b_at = tl.load(p_at + o_key, mask=o_key < m, other=-FAR)[None, :]
            m_seen = (b_at >= b_lo[:, None]) & (b_at < b_hi[:, None])
            if MASK == BOTH:
                m_seen = m_seen | ((b_at >= b_plo[:, None]) & (b_at < b_phi[:, None]))
            b_s = tl.where(m_seen, b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if DROPOUT:
            b_word = tl.load(p_drop_key + o_key, mask=o_key < m, other=0)
            m_kept = kept(b_a[:, None], b_c[:, None], b_word[None, :], threshold)
            b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if SOFTCAP:
            b_ds = b_ds * b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)  # [ROWS, BD]
    return b_dq
