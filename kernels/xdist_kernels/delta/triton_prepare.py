"""Triton kernel: what of each chunk needs no state. Letters of torch.py; see triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.delta.triton_chunks import (
    Arg,
    between,
    halves_meet,
    log_decay,
    log_decay_block,
    sibling,
    token_block,
    unit_inverse,
)


@triton.jit
def _seen(
    p_q: Arg, p_k: Arg, o_t: Arg, stride_q: Arg, stride_k: Arg, T: Arg, K: tl.constexpr,
    KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, ASKED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
) -> Arg:  # fmt: skip
    """Q K^T and K K^T [C, C], whole; the first only where ASKED."""
    b_a = tl.zeros([C, C], dtype=tl.float32)
    b_l = tl.zeros([C, C], dtype=tl.float32)
    for i_k in range(0, KP, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = token_block(p_k, o_t, o_k, stride_k, T, K).to(OPERAND)  # [C, BK]
        b_l = tl.dot(b_k, tl.trans(b_k), b_l, input_precision=PRECISION)
        if ASKED:
            b_q = token_block(p_q, o_t, o_k, stride_q, T, K).to(OPERAND)  # [C, BK]
            b_a = tl.dot(b_q, tl.trans(b_k), b_a, input_precision=PRECISION)
    return b_a, b_l


@triton.jit
def _seen_diagonal(
    p_q: Arg, p_k: Arg, p_g: Arg, p_starts: Arg, o_t: Arg, stride_q: Arg, stride_k: Arg,
    stride_g: Arg, T: Arg, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, ASKED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
) -> Arg:  # fmt: skip
    """sum_k q_ik D_ijk k_jk for j <= i, and the same of keys for j < i: two [C, C].

    s, e = log decays, 0                      to a token from its block's start, and behind it
    for half = 1, 2, .. C/2:                  blocks of 2 * half tokens
        x = exp2(s in second halves, e in first ones)           from, or to, the middle
        second halves see first ones: (q x) (k x)^T
        s, e += the sum of the block's other half, where it lies between
    """
    o_c = tl.arange(0, C)
    m_t = o_t < T
    b_a = tl.zeros([C, C], dtype=tl.float32)
    b_l = tl.zeros([C, C], dtype=tl.float32)
    for i_k in range(0, KP, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = token_block(p_k, o_t, o_k, stride_k, T, K).to(tl.float32)  # [C, BK]
        b_q = b_k
        if ASKED:
            b_q = token_block(p_q, o_t, o_k, stride_q, T, K).to(tl.float32)  # [C, BK]
            b_a += tl.where(o_c[:, None] == o_c[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
        b_g = log_decay_block(p_g, p_starts, o_t, m_t, o_k, stride_g, K)  # [C, BK]
        b_since, b_until = b_g, tl.zeros([C, BK], dtype=tl.float32)
        for level in tl.static_range(0, LEVELS):
            m_late = ((o_c // (1 << level)) % 2 == 1)[:, None]  # [C, 1]
            m_meet = halves_meet(o_c, 1 << level)  # [C, C]
            b_x = tl.exp2(tl.where(m_late, b_since, b_until))  # [C, BK]
            b_kx = (b_k * b_x).to(OPERAND)
            b_seen = tl.dot(b_kx, tl.trans(b_kx), input_precision=PRECISION)
            b_l += tl.where(m_meet, b_seen, 0.0)
            if ASKED:
                b_qx = (b_q * b_x).to(OPERAND)
                b_seen = tl.dot(b_qx, tl.trans(b_kx), input_precision=PRECISION)
                b_a += tl.where(m_meet, b_seen, 0.0)
            if level < LEVELS - 1:
                b_other = sibling(b_g, 1 << level, C, BK)
                b_since += tl.where(m_late, b_other, 0.0)
                b_until += tl.where(m_late, 0.0, b_other)
    return b_a, b_l


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    p_q: Arg, p_k: Arg, p_v: Arg, p_beta: Arg, p_g: Arg, p_starts: Arg,
    p_weight: Arg, p_entry: Arg, p_reads: Arg, p_own: Arg, p_keys: Arg, p_fade: Arg,
    p_since: Arg, p_until: Arg, p_whole: Arg, p_scores: Arg, p_lows: Arg, p_inverse: Arg,
    T: Arg, H: Arg, GROUP: Arg, scale: Arg,
    stride_qb: Arg, stride_qt: Arg, stride_qh: Arg, stride_kb: Arg, stride_kt: Arg, stride_kh: Arg,
    stride_vb: Arg, stride_vt: Arg, stride_vh: Arg, stride_bb: Arg, stride_bt: Arg, stride_bh: Arg,
    stride_gb: Arg, stride_gt: Arg, stride_gh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE: tl.constexpr,
) -> None:  # fmt: skip
    """One chunk of one head a program; D_ij the decay from token j to token i, b = beta.

        A = tril(scale Q K^T * D),  L = tril(K K^T * D, -1)
        P = (I + L diag(b))^-1
        weight = -P K'                     K' decayed from the chunk's start
        entry  = P V
        reads  = Q' + (A b) weight         own = (A b) entry
        fade   = b, times the decay to the chunk's end where that is one number a token
        keys   = K decayed to the chunk's end, where the decay is one a key dim
        whole  = the chunk's decay

    Left out where the pointer is None. Of [B * H, chunks, C, ...], filled with zeros past T.
    """
    OPERAND: tl.constexpr = p_weight.dtype.element_ty
    ASKED: tl.constexpr = p_scores is not None or p_reads is not None
    chunks = tl.cdiv(T, C)
    i_n = tl.program_id(0).to(tl.int64)
    i_row, i_c = i_n // chunks, i_n % chunks
    i_b, i_h = i_row // H, i_row % H
    o_c = tl.arange(0, C)
    o_t = i_c * C + o_c  # [C]
    m_t = o_t < T
    p_q += i_b * stride_qb + (i_h // GROUP) * stride_qh
    p_k += i_b * stride_kb + (i_h // GROUP) * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_beta += i_b * stride_bb + i_h * stride_bh
    if p_g is not None:
        p_g += i_b * stride_gb + i_h * stride_gh
    o_n = i_n * C + o_c  # [C], rows of what is written
    m_lower = o_c[:, None] >= o_c[None, :]  # [C, C]

    if DECAY == 2:
        b_a, b_l = _seen_diagonal(
            p_q, p_k, p_g, p_starts, o_t, stride_qt, stride_kt, stride_gt, T, K, KP, C, LEVELS,
            BK, ASKED, OPERAND, PRECISION,
        )  # fmt: skip
        b_a *= scale
    else:
        b_a, b_l = _seen(
            p_q, p_k, o_t, stride_qt, stride_kt, T, K, KP, C, BK, ASKED, OPERAND, PRECISION
        )
        b_a = tl.where(m_lower, b_a * scale, 0.0)
        b_l = tl.where(o_c[:, None] > o_c[None, :], b_l, 0.0)
    b_b = tl.load(p_beta + o_t * stride_bt, mask=m_t, other=0.0).to(tl.float32)  # [C]
    b_fade = b_b
    b_since = b_b
    if DECAY == 1:
        b_g = log_decay(p_g, p_starts, o_t, m_t, stride_gt, C)  # [C]
        m_behind = (o_c < C - 1) & (o_t + 1 < T)
        b_behind = log_decay(p_g, p_starts, o_t + 1, m_behind, stride_gt, C)  # [C]
        b_between = between(b_g, C)
        b_a *= b_between
        b_l *= b_between
        b_since = tl.exp2(tl.cumsum(b_g, 0))
        b_until = tl.exp2(tl.cumsum(b_behind, 0, reverse=True))
        b_fade = b_b * b_until
        tl.store(p_whole + i_n, tl.exp2(tl.sum(b_g, 0)))
        if p_since is not None:
            tl.store(p_since + o_n, b_since)
            tl.store(p_until + o_n, b_until)
    tl.store(p_fade + o_n, b_fade)

    b_p = unit_inverse(b_l * b_b[None, :], C, LEVELS, INVERSE)  # [C, C]
    b_ab = (b_a * b_b[None, :]).to(OPERAND)
    b_pk = -b_p
    if DECAY == 1:
        b_pk *= b_since[None, :]
    b_pk, b_pv = b_pk.to(OPERAND), b_p.to(OPERAND)
    if p_scores is not None:
        o_cc = i_n * (C * C) + o_c[:, None] * C + o_c[None, :]  # [C, C]
        tl.store(p_scores + o_cc, b_a.to(OPERAND))
        tl.store(p_lows + o_cc, b_l.to(OPERAND))
        tl.store(p_inverse + o_cc, b_pv)

    for i_k in range(0, KP, BK):
        o_k = i_k + tl.arange(0, BK)
        o_nk = o_n[:, None] * KP + o_k[None, :]  # [C, BK]
        b_k = token_block(p_k, o_t, o_k, stride_kt, T, K)  # [C, BK]
        b_start = b_since[:, None]
        if DECAY == 2:
            b_gk = log_decay_block(p_g, p_starts, o_t, m_t, o_k, stride_gt, K)  # [C, BK]
            m_behind = (o_c < C - 1) & (o_t + 1 < T)
            b_behind = log_decay_block(p_g, p_starts, o_t + 1, m_behind, o_k, stride_gt, K)
            b_start = tl.exp2(tl.cumsum(b_gk, 0))
            b_end = tl.exp2(tl.cumsum(b_behind, 0, reverse=True))
            b_k32 = b_k.to(tl.float32)
            tl.store(p_keys + o_nk, (b_k32 * b_end).to(OPERAND))
            tl.store(p_whole + i_n * KP + o_k, tl.exp2(tl.sum(b_gk, 0)))
            b_k = b_k32 * b_start
        b_weight = tl.dot(b_pk, b_k.to(OPERAND), input_precision=PRECISION).to(OPERAND)
        tl.store(p_weight + o_nk, b_weight)
        if p_reads is not None:
            b_q = token_block(p_q, o_t, o_k, stride_qt, T, K).to(tl.float32) * scale  # [C, BK]
            if DECAY > 0:
                b_q *= b_start
            b_q = tl.dot(b_ab, b_weight, b_q, input_precision=PRECISION)
            tl.store(p_reads + o_nk, b_q.to(OPERAND))
    if p_entry is not None:
        for i_v in range(0, VP, BV):
            o_v = i_v + tl.arange(0, BV)
            o_nv = o_n[:, None] * VP + o_v[None, :]  # [C, BV]
            b_v = token_block(p_v, o_t, o_v, stride_vt, T, V).to(OPERAND)  # [C, BV]
            b_u = tl.dot(b_pv, b_v, input_precision=PRECISION).to(OPERAND)
            tl.store(p_entry + o_nv, b_u)
            if p_own is not None:
                b_own = tl.dot(b_ab, b_u, input_precision=PRECISION)
                tl.store(p_own + o_nv, b_own.to(OPERAND))
