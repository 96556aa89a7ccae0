"""Triton kernels: gradients of the inputs of each chunk, its states and their gradients given.

Letters of backward.py. What of a decay's gradient crosses a token is summed for itself, so that
nothing large cancels and documents stay apart: rows behind the token that read the state before
the chunk, keys in front of it that reach the chunk's end, the state that passes through, and the
pairs of a row behind and a key in front.
"""

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
    store_tokens,
    token_block,
)


@triton.jit(do_not_specialize=["T"])
def writes_kernel(
    p_q: Arg, p_k: Arg, p_keys: Arg, p_v: Arg, p_weight: Arg, p_entry: Arg, p_dout: Arg,
    p_beta: Arg, p_g: Arg, p_starts: Arg, p_since: Arg, p_until: Arg, p_whole: Arg,
    p_scores: Arg, p_lows: Arg, p_inverse: Arg, p_states: Arg, p_dstates: Arg,
    p_dv: Arg, p_n: Arg, p_dscores: Arg, p_dlows: Arg, p_dbeta: Arg, p_dg: Arg,
    T: Arg, H: Arg, GROUP: Arg, scale: Arg,
    stride_qb: Arg, stride_qt: Arg, stride_qh: Arg, stride_kb: Arg, stride_kt: Arg, stride_kh: Arg,
    stride_vb: Arg, stride_vt: Arg, stride_vh: Arg, stride_ob: Arg, stride_ot: Arg, stride_oh: Arg,
    stride_bb: Arg, stride_bt: Arg, stride_bh: Arg, stride_gb: Arg, stride_gt: Arg, stride_gh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """What one chunk of one head wrote, and all gradients that need sums over value dims.

    R  = P (V - K' S)                  or entry + weight S where the decay is one a key dim
    N  = b R
    dN = A^T dO + K" dS
    dX = P^T (b dN) = dV
    db = rowsum((dN - L^T dX) * R)
    dA = tril(dO N^T),  dL = -tril(dX N^T, -1)             kept times scale D, and times D
    dg = for one decay a token, the sums of the module's head
    """
    OPERAND: tl.constexpr = p_scores.dtype.element_ty
    # Whether there is the gradient of one decay a token to make.
    GATED: tl.constexpr = DECAY == 1 and p_dg is not None
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
    p_dout += i_b * stride_ob + i_h * stride_oh
    p_dv += i_b * T * H * V + i_h * V
    o_n = i_n * C + o_c  # [C]
    o_cc = i_n * (C * C) + o_c[:, None] * C + o_c[None, :]  # [C, C]
    o_bt = (i_b * T + o_t) * H + i_h  # [C]
    b_b = tl.load(p_beta + i_b * stride_bb + i_h * stride_bh + o_t * stride_bt, mask=m_t, other=0.0)
    b_b = b_b.to(tl.float32)[:, None]  # [C, 1]
    b_since = b_b
    b_until = b_b
    if DECAY == 1:
        b_since = tl.load(p_since + o_n)[:, None]  # [C, 1]
        b_until = tl.load(p_until + o_n)[:, None]
    b_a, b_l = tl.load(p_scores + o_cc), tl.load(p_lows + o_cc)  # [C, C]
    b_p = tl.load(p_inverse + o_cc)

    b_da = tl.zeros([C, C], dtype=tl.float32)
    b_dl = tl.zeros([C, C], dtype=tl.float32)
    b_db = tl.zeros([C], dtype=tl.float32)
    b_late = tl.zeros([C], dtype=tl.float32)  # what a row reads of the state before the chunk
    b_early = tl.zeros([C], dtype=tl.float32)  # what a key adds to the state behind it
    b_through = tl.zeros([BK], dtype=tl.float32)  # what passes
    for i_v in range(0, VP, BV):
        o_v = i_v + tl.arange(0, BV)
        b_ks = tl.zeros([C, BV], dtype=tl.float32)
        b_qs = tl.zeros([C, BV], dtype=tl.float32)
        b_kd = tl.zeros([C, BV], dtype=tl.float32)
        for i_k in range(0, KP, BK):
            o_k = i_k + tl.arange(0, BK)
            o_kv = i_n * (KP * VP) + o_k[:, None] * VP + o_v[None, :]
            b_s, b_ds = tl.load(p_states + o_kv), tl.load(p_dstates + o_kv)  # [BK, BV]
            if DECAY == 2:
                o_nk = o_n[:, None] * KP + o_k[None, :]
                b_k = tl.load(p_keys + o_nk)  # [C, BK]
                b_weight = tl.load(p_weight + o_nk)
                b_ks = tl.dot(b_weight, b_s, b_ks, input_precision=PRECISION)
            else:
                b_k = token_block(p_k, o_t, o_k, stride_kt, T, K).to(OPERAND)  # [C, BK]
                b_ks = tl.dot(b_k, b_s, b_ks, input_precision=PRECISION)
            b_kd = tl.dot(b_k, b_ds, b_kd, input_precision=PRECISION)
            if GATED:
                b_q = token_block(p_q, o_t, o_k, stride_qt, T, K).to(OPERAND)  # [C, BK]
                b_qs = tl.dot(b_q, b_s, b_qs, input_precision=PRECISION)
                b_through += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
        b_do = token_block(p_dout, o_t, o_v, stride_ot, T, V).to(OPERAND)  # [C, BV]
        if DECAY == 2:
            b_r = b_ks + tl.load(p_entry + o_n[:, None] * VP + o_v[None, :]).to(tl.float32)
        else:
            if DECAY == 1:
                b_ks *= b_since
                b_kd *= b_until
            b_x = token_block(p_v, o_t, o_v, stride_vt, T, V).to(tl.float32) - b_ks
            b_r = tl.dot(b_p, b_x.to(OPERAND), input_precision=PRECISION)  # [C, BV]
        b_n32 = b_r * b_b
        b_n = b_n32.to(OPERAND)
        tl.store(p_n + o_n[:, None] * VP + o_v[None, :], b_n)
        b_dn = tl.dot(tl.trans(b_a), b_do, b_kd, input_precision=PRECISION)  # [C, BV]
        b_dx32 = tl.dot(tl.trans(b_p), (b_dn * b_b).to(OPERAND), input_precision=PRECISION)
        b_dx = b_dx32.to(OPERAND)
        store_tokens(p_dv, b_dx32, o_t, o_v, H * V, T, V)
        b_dn -= tl.dot(tl.trans(b_l), b_dx, input_precision=PRECISION)
        b_db += tl.sum(b_dn * b_r, 1)
        b_da = tl.dot(b_do, tl.trans(b_n), b_da, input_precision=PRECISION)
        b_dl -= tl.dot(b_dx, tl.trans(b_n), input_precision=PRECISION)
        if GATED:
            b_qs *= b_since * scale
            b_late += tl.sum(b_do.to(tl.float32) * b_qs - b_dx32 * b_ks, 1)
            b_early += tl.sum(b_n32 * b_kd, 1)
    tl.store(p_dbeta + o_bt, b_db, mask=m_t)

    o_i, o_j = o_c[:, None], o_c[None, :]
    b_da = tl.where(o_i >= o_j, b_da, 0.0)
    b_dl = tl.where(o_i > o_j, b_dl, 0.0)
    if GATED:
        b_pair = tl.where(o_i > o_j, b_da * b_a.to(tl.float32), 0.0) + b_dl * b_l.to(tl.float32)
        b_pair = tl.cumsum(b_pair, 0, reverse=True)  # [C, C], rows i and behind
        b_dg = tl.sum(tl.where(o_i > o_j, b_pair, 0.0), 1)  # [C]
        b_dg += tl.cumsum(b_late, 0, reverse=True) + (tl.cumsum(b_early, 0) - b_early)
        b_dg += tl.load(p_whole + i_n) * tl.sum(b_through, 0)
        if p_starts is not None:
            # A document's first decay acts on nothing.
            b_dg = tl.where(tl.load(p_starts + o_t, mask=m_t, other=0) != 0, 0.0, b_dg)
        tl.store(p_dg + o_bt, b_dg, mask=m_t)
    if DECAY == 1:
        if p_g is not None:
            p_g += i_b * stride_gb + i_h * stride_gh
        b_between = between(log_decay(p_g, p_starts, o_t, m_t, stride_gt, C), C)
        b_da *= b_between
        b_dl *= b_between
    tl.store(p_dscores + o_cc, (b_da * scale).to(OPERAND))
    tl.store(p_dlows + o_cc, b_dl.to(OPERAND))


@triton.jit(do_not_specialize=["T"])
def keys_kernel(
    p_q: Arg, p_k: Arg, p_g: Arg, p_starts: Arg, p_since: Arg, p_until: Arg, p_whole: Arg,
    p_dout: Arg, p_dx: Arg, p_n: Arg, p_states: Arg, p_dstates: Arg, p_dscores: Arg, p_dlows: Arg,
    p_dq: Arg, p_dk: Arg, p_dg: Arg,
    T: Arg, H: Arg, GROUP: Arg, scale: Arg,
    stride_qb: Arg, stride_qt: Arg, stride_qh: Arg, stride_kb: Arg, stride_kt: Arg, stride_kh: Arg,
    stride_ob: Arg, stride_ot: Arg, stride_oh: Arg, stride_gb: Arg, stride_gt: Arg, stride_gh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Key dims of one chunk of one head a program.

        dQ    = scale * (dO S^T decayed from the start) + (dA * D) K
        asks  = -dX S^T decayed from the start          + (dL * D) K
        seen  = N dS^T decayed to the end               + (dA * D)^T Q + (dL * D)^T K
        dK    = asks + seen

    One decay a key dim: the products with dA and dL by halves, as `_seen_diagonal`, and dg.
    """
    OPERAND: tl.constexpr = p_n.dtype.element_ty
    chunks = tl.cdiv(T, C)
    i_k = tl.program_id(0) % (KP // BK)
    i_n = (tl.program_id(0) // (KP // BK)).to(tl.int64)
    i_row, i_c = i_n // chunks, i_n % chunks
    i_b, i_h = i_row // H, i_row % H
    o_c, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    o_t = i_c * C + o_c  # [C]
    p_q += i_b * stride_qb + (i_h // GROUP) * stride_qh
    p_k += i_b * stride_kb + (i_h // GROUP) * stride_kh
    p_dout += i_b * stride_ob + i_h * stride_oh
    p_dx += i_b * T * H * V + i_h * V
    o_n = i_n * C + o_c  # [C]
    o_cc = i_n * (C * C) + o_c[:, None] * C + o_c[None, :]  # [C, C]

    b_da, b_dl = tl.load(p_dscores + o_cc), tl.load(p_dlows + o_cc)  # [C, C]
    if DECAY == 1:
        b_since, b_until = tl.load(p_since + o_n)[:, None], tl.load(p_until + o_n)[:, None]
    if DECAY == 2:
        p_g += i_b * stride_gb + i_h * stride_gh
        b_qi, b_ai, b_si, b_since, b_until = _pairs(
            p_q, p_k, p_g, p_starts, b_da, b_dl, o_t, o_k, stride_qt, stride_kt, stride_gt, T, K,
            C, LEVELS, BK, OPERAND, PRECISION,
        )  # fmt: skip

    b_dq = tl.zeros([C, BK], dtype=tl.float32)
    b_asks = tl.zeros([C, BK], dtype=tl.float32)
    b_seen = tl.zeros([C, BK], dtype=tl.float32)
    b_through = tl.zeros([BK], dtype=tl.float32)
    for i_v in range(0, VP, BV):
        o_v = i_v + tl.arange(0, BV)
        o_kv = i_n * (KP * VP) + o_k[:, None] * VP + o_v[None, :]
        b_s, b_ds = tl.load(p_states + o_kv), tl.load(p_dstates + o_kv)  # [BK, BV]
        b_do = token_block(p_dout, o_t, o_v, stride_ot, T, V).to(OPERAND)  # [C, BV]
        b_dx = token_block(p_dx, o_t, o_v, H * V, T, V).to(OPERAND)
        b_n = tl.load(p_n + o_n[:, None] * VP + o_v[None, :])
        b_dq = tl.dot(b_do, tl.trans(b_s), b_dq, input_precision=PRECISION)
        b_asks = tl.dot(b_dx, tl.trans(b_s), b_asks, input_precision=PRECISION)
        b_seen = tl.dot(b_n, tl.trans(b_ds), b_seen, input_precision=PRECISION)
        if DECAY == 2:
            b_through += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
    b_dq *= scale
    b_asks = -b_asks
    if DECAY > 0:
        b_dq *= b_since
        b_asks *= b_since
        b_seen *= b_until

    o_head = i_b * T * H * K + i_h * K
    b_q = token_block(p_q, o_t, o_k, stride_qt, T, K)  # [C, BK]
    b_k = token_block(p_k, o_t, o_k, stride_kt, T, K)
    if DECAY == 2:
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_dg = b_q * (b_dq + b_qi) + b_k * (b_asks + b_ai - b_si)
        b_early = b_k * b_seen
        b_dg = tl.cumsum(b_dg, 0, reverse=True) + (tl.cumsum(b_early, 0) - b_early)
        b_dg += (tl.load(p_whole + i_n * KP + o_k) * b_through)[None, :]
        if p_starts is not None:
            # A document's first decay acts on nothing.
            m_start = tl.load(p_starts + o_t, mask=o_t < T, other=0) != 0
            b_dg = tl.where(m_start[:, None], 0.0, b_dg)
        store_tokens(p_dg + o_head, b_dg, o_t, o_k, H * K, T, K)
        # A token that sees itself, without a decay between.
        m_self = o_c[:, None] == o_c[None, :]
        b_self = tl.sum(tl.where(m_self, b_da.to(tl.float32), 0.0), 1)[:, None]  # [C, 1]
        b_dq += b_qi + b_self * b_k
        b_dk = b_asks + b_ai + b_seen + b_si + b_self * b_q
    else:
        b_q, b_k = b_q.to(OPERAND), b_k.to(OPERAND)
        b_dq = tl.dot(b_da, b_k, b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_dl, b_k, b_asks + b_seen, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_da), b_q, b_dk, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_dl), b_k, b_dk, input_precision=PRECISION)
    store_tokens(p_dq + o_head, b_dq, o_t, o_k, H * K, T, K)
    store_tokens(p_dk + o_head, b_dk, o_t, o_k, H * K, T, K)


@triton.jit
def _pairs(
    p_q: Arg, p_k: Arg, p_g: Arg, p_starts: Arg, b_da: Arg, b_dl: Arg, o_t: Arg, o_k: Arg,
    stride_qt: Arg, stride_kt: Arg, stride_gt: Arg, T: Arg, K: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
) -> Arg:  # fmt: skip
    """What pairs of different tokens add to dQ, asks and seen with one decay a key dim, and the
    decays from the chunk's start and to its end: five [C, BK].

        for half = 1, 2, .. C/2:                             x as in `_seen_diagonal`
            dQ   += x (dA (K x)),  asks += x (dL (K x))      second halves from first ones
            seen += x (dA^T (Q x) + dL^T (K x))              the way back
    """
    o_c = tl.arange(0, C)
    b_q = token_block(p_q, o_t, o_k, stride_qt, T, K).to(tl.float32)  # [C, BK]
    b_k = token_block(p_k, o_t, o_k, stride_kt, T, K).to(tl.float32)
    b_g = log_decay_block(p_g, p_starts, o_t, o_t < T, o_k, stride_gt, K)  # [C, BK]
    b_since, b_until = b_g, tl.zeros([C, BK], dtype=tl.float32)
    b_dq = tl.zeros([C, BK], dtype=tl.float32)
    b_asks = tl.zeros([C, BK], dtype=tl.float32)
    b_seen = tl.zeros([C, BK], dtype=tl.float32)
    b_zero = tl.zeros([C, C], dtype=OPERAND)
    for level in tl.static_range(0, LEVELS):
        m_late = ((o_c // (1 << level)) % 2 == 1)[:, None]  # [C, 1]
        m_meet = halves_meet(o_c, 1 << level)  # [C, C]
        b_x = tl.exp2(tl.where(m_late, b_since, b_until))  # [C, BK]
        b_kx, b_qx = (b_k * b_x).to(OPERAND), (b_q * b_x).to(OPERAND)
        b_dam, b_dlm = tl.where(m_meet, b_da, b_zero), tl.where(m_meet, b_dl, b_zero)
        b_dq += b_x * tl.dot(b_dam, b_kx, input_precision=PRECISION)
        b_asks += b_x * tl.dot(b_dlm, b_kx, input_precision=PRECISION)
        b_back = tl.dot(tl.trans(b_dam), b_qx, input_precision=PRECISION)
        b_back = tl.dot(tl.trans(b_dlm), b_kx, b_back, input_precision=PRECISION)
        b_seen += b_x * b_back
        b_other = sibling(b_g, 1 << level, C, BK)
        b_since += tl.where(m_late, b_other, 0.0)
        b_until += tl.where(m_late, 0.0, b_other)
    return b_dq, b_asks, b_seen, tl.exp2(b_since), tl.exp2(b_until)
