"""Attention's backward kernel for keys and values; its pseudo-code is in triton_backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.attention.triton_plan import FAR
from xdist_kernels.attention.triton_scores import BOTH, LOG2E, NONE, OWN, Arg, block, kept, tanh


@triton.jit(
    do_not_specialize=[
        "scale", "cap", "keep_scale", "threshold", "n", "m", "n_keys", "heads", "per_group",
        "per_part", "sets", "s_lb", "s_lt", "s_lh", "s_eb", "s_et", "s_eh",
    ]
)  # fmt: skip
def attention_dkdv_kernel(
    p_q: Arg, p_k: Arg, p_v: Arg, p_dout: Arg, p_lse: Arg, p_delta: Arg, p_dk: Arg, p_dv: Arg,
    p_spans: Arg, p_prefixed: Arg, p_at: Arg, p_visits: Arg, p_counts: Arg,
    p_drop_a: Arg, p_drop_c: Arg, p_drop_key: Arg,
    scale: Arg, cap: Arg, keep_scale: Arg, threshold: Arg,
    n: Arg, m: Arg, n_keys: Arg, heads: Arg, per_group: Arg, per_part: Arg, sets: Arg,
    s_qb: Arg, s_qt: Arg, s_qh: Arg, s_kb: Arg, s_kt: Arg, s_kh: Arg,
    s_vb: Arg, s_vt: Arg, s_vh: Arg, s_gb: Arg, s_gt: Arg, s_gh: Arg,
    s_lb: Arg, s_lt: Arg, s_lh: Arg, s_eb: Arg, s_et: Arg, s_eh: Arg,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MOST: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """dk `[parts,B,m,G,D]` and dv `[parts,B,m,G,E]`, contiguous; a part has per_part query heads
    of each key head."""
    i_key = tl.program_id(0) % n_keys
    i_bgp = (tl.program_id(0) // n_keys).to(tl.int64)
    parts, groups = per_group // per_part, heads // per_group
    i_part, i_g, i_b = i_bgp % parts, i_bgp // parts % groups, i_bgp // parts // groups
    o_key = i_key * KEYS + tl.arange(0, KEYS)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    m_key = o_key < m
    m_k = m_key[:, None] & (o_d < D)[None, :]
    m_v = m_key[:, None] & (o_e < E)[None, :]
    t_key = o_key.to(tl.int64)

    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh
    b_k = tl.load(p_k + t_key[:, None] * s_kt + o_d[None, :], mask=m_k, other=0.0)  # [KEYS, BD]
    b_v = tl.load(p_v + t_key[:, None] * s_vt + o_e[None, :], mask=m_v, other=0.0)  # [KEYS, BE]
    b_at = tl.load(p_at + o_key, mask=m_key, other=-FAR)  # [KEYS]
    b_word = tl.zeros([KEYS], tl.int32)
    if DROPOUT:
        b_word = tl.load(p_drop_key + o_key, mask=m_key, other=0)
    b_dk = tl.zeros([KEYS, BD], tl.float32)
    b_dv = tl.zeros([KEYS, BE], tl.float32)
    to_span = tl.cast(sets, tl.int64) * n
    for i_head in range(per_part):
        i_h = i_g * per_group + i_part * per_part + i_head
        i_set = i_h % sets
        p_q_ = p_q + i_b * s_qb + i_h * s_qh
        p_do_ = p_dout + i_b * s_gb + i_h * s_gh
        p_lse_ = p_lse + i_b * s_lb + i_h * s_lh
        p_delta_ = p_delta + i_b * s_eb + i_h * s_eh
        p_lo = p_spans + i_set * n
        to_word = (i_b * heads + i_h) * n
        prefixed = tl.load(p_prefixed + i_set) != 0
        i_plan = i_set * n_keys + i_key
        p_visit = p_visits + i_plan * (4 * MOST)
        for i_piece in range(tl.load(p_counts + i_plan)):
            start = tl.load(p_visit + 4 * i_piece)
            full = tl.load(p_visit + 4 * i_piece + 1)
            partial = tl.load(p_visit + 4 * i_piece + 2)
            stop = tl.load(p_visit + 4 * i_piece + 3)
            # One of the first two loops is empty: a branch would hold buffers for both.
            end = full + stop - partial
            own = tl.where(prefixed, end, start)
            b_dk, b_dv = _to_keys(
                b_dk, b_dv, b_k, b_v, b_at, b_word, p_q_, p_do_, p_lse_, p_delta_, p_lo,
                to_span, p_drop_a, p_drop_c, to_word, start, own, full, partial - full,
                scale, cap, keep_scale, threshold, n, s_qt, s_gt, s_lt, s_et,
                D, E, BD, BE, ROWS, BOTH, SOFTCAP, DROPOUT, PRECISION,
            )  # fmt: skip
            b_dk, b_dv = _to_keys(
                b_dk, b_dv, b_k, b_v, b_at, b_word, p_q_, p_do_, p_lse_, p_delta_, p_lo,
                to_span, p_drop_a, p_drop_c, to_word, own, end, full, partial - full,
                scale, cap, keep_scale, threshold, n, s_qt, s_gt, s_lt, s_et,
                D, E, BD, BE, ROWS, OWN, SOFTCAP, DROPOUT, PRECISION,
            )  # fmt: skip
            b_dk, b_dv = _to_keys(
                b_dk, b_dv, b_k, b_v, b_at, b_word, p_q_, p_do_, p_lse_, p_delta_, p_lo,
                to_span, p_drop_a, p_drop_c, to_word, full, partial, full, 0,
                scale, cap, keep_scale, threshold, n, s_qt, s_gt, s_lt, s_et,
                D, E, BD, BE, ROWS, NONE, SOFTCAP, DROPOUT, PRECISION,
            )  # fmt: skip
    if DROPOUT:
        b_dv = b_dv * keep_scale
    # Row (part, b, key, g) of the outputs.
    batches = tl.num_programs(0) // n_keys // parts // groups
    b_row = ((i_part * batches + i_b) * m + t_key) * groups + i_g
    p_dk += b_row[:, None] * D + o_d[None, :]
    p_dv += b_row[:, None] * E + o_e[None, :]
    tl.store(p_dk, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_k)
    tl.store(p_dv, b_dv.to(p_dv.dtype.element_ty), mask=m_v)


@triton.jit
def _to_keys(
    b_dk: Arg, b_dv: Arg, b_k: Arg, b_v: Arg, b_at: Arg, b_word: Arg,
    p_q: Arg, p_dout: Arg, p_lse: Arg, p_delta: Arg, p_lo: Arg, to_span: Arg,
    p_drop_a: Arg, p_drop_c: Arg, to_word: Arg, start: Arg, stop: Arg, turn: Arg, skip: Arg,
    scale: Arg, cap: Arg, keep_scale: Arg, threshold: Arg, n: Arg,
    s_qt: Arg, s_gt: Arg, s_lt: Arg, s_et: Arg,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> Arg:  # fmt: skip
    """Blocks of queries `[start, stop)` of one head, from `turn` on `skip` further, under MASK."""
    s_qt, s_gt = tl.cast(s_qt, tl.int64), tl.cast(s_gt, tl.int64)
    o_i, o_d, o_e = tl.arange(0, ROWS), tl.arange(0, BD), tl.arange(0, BE)
    o_q = o_i[:, None] * s_qt + o_d[None, :]
    o_do = o_i[:, None] * s_gt + o_e[None, :]
    for i_visit in range(start, stop):
        i_row = i_visit
        if MASK != NONE:
            i_row = i_visit + tl.where(i_visit < turn, 0, skip)
        o_row = i_row * ROWS + o_i
        m_row = o_row < n
        t_row = o_row.to(tl.int64)
        p_q_ = p_q + i_row * ROWS * s_qt
        p_do_ = p_dout + i_row * ROWS * s_gt
        b_q = block(p_q_ + o_q, o_row, o_d, n, D, BD, MASK)  # [ROWS, BD]
        b_do = block(p_do_ + o_do, o_row, o_e, n, E, BE, MASK)  # [ROWS, BE]
        b_lse = tl.load(p_lse + t_row * s_lt, mask=m_row, other=0.0)
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E)
        b_delta = tl.load(p_delta + t_row * s_et, mask=m_row, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [KEYS, ROWS]
        if SOFTCAP:
            b_s = tanh(b_s * (scale / cap))
            b_slope = 1.0 - b_s * b_s
            b_s = b_s * (cap * LOG2E)
        else:
            b_s = b_s * (scale * LOG2E)
        if MASK != NONE:
            b_lo = tl.load(p_lo + o_row, mask=m_row, other=FAR)[None, :]
            b_hi = tl.load(p_lo + to_span + o_row, mask=m_row, other=-FAR)[None, :]
            m_seen = (b_at[:, None] >= b_lo) & (b_at[:, None] < b_hi)
            if MASK == BOTH:
                b_lo = tl.load(p_lo + 2 * to_span + o_row, mask=m_row, other=FAR)[None, :]
                b_hi = tl.load(p_lo + 3 * to_span + o_row, mask=m_row, other=-FAR)[None, :]
                m_seen = m_seen | ((b_at[:, None] >= b_lo) & (b_at[:, None] < b_hi))
            b_s = tl.where(m_seen, b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_seen = b_p
        if DROPOUT:
            b_a = tl.load(p_drop_a + to_word + o_row, mask=m_row, other=0)[None, :]
            b_c = tl.load(p_drop_c + to_word + o_row, mask=m_row, other=0)[None, :]
            m_kept = kept(b_a, b_c, b_word[:, None], threshold)
            b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
            b_seen = tl.where(m_kept, b_p, 0.0)
        b_dv = tl.dot(b_seen.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)  # [KEYS, BE]
        b_ds = b_p * (b_dp - b_delta[None, :])
        if SOFTCAP:
            b_ds = b_ds * b_slope
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)  # [KEYS, BD]
    return b_dk, b_dv
