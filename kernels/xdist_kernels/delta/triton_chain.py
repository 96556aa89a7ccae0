"""Triton kernels: the chain over chunks, forward and back. Letters of triton_prepare.py.

A program holds columns of a state in float32 and walks over the chunks of its head; the operands of
products have the dtype of `p_weight`. The state is one block [KP, BV], or several [BK, BV] where no
tensor core multiplies: a product holds all of its operands in registers there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xdist_kernels.delta.triton_chunks import Arg, store_tokens, token_block


@triton.jit
def _kept(p_whole: Arg, b_s: Arg, i_n: Arg, o_k: Arg, KP: tl.constexpr, DECAY: tl.constexpr) -> Arg:
    """Rows o_k [BK] of a state [BK, BV] times the decay of chunk i_n."""
    if DECAY == 1:
        b_s *= tl.load(p_whole + i_n)
    if DECAY == 2:
        b_s *= tl.load(p_whole + i_n * KP + o_k)[:, None]
    return b_s


@triton.jit
def _forward(
    program: Arg, p_weight: Arg, p_entry: Arg, p_reads: Arg, p_own: Arg, p_keys: Arg, p_fade: Arg,
    p_whole: Arg, p_start: Arg, p_states: Arg, p_out: Arg, p_end: Arg,
    T: Arg, H: Arg, GROUP: Arg, stride_kb: Arg, stride_kt: Arg, stride_kh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """`forward_chain_kernel`; what is written may be None."""
    OPERAND: tl.constexpr = p_weight.dtype.element_ty
    i_v = program % (VP // BV)
    i_row = (program // (VP // BV)).to(tl.int64)
    i_b, i_h = i_row // H, i_row % H
    chunks = tl.cdiv(T, C)
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    p_keys += i_b * stride_kb + (i_h // GROUP) * stride_kh
    o_s = i_row * (K * V) + o_k[:, None] * V + o_v[None, :]  # [BK, BV]
    o_kv = o_k[:, None] * VP + o_v[None, :]  # [BK, BV]
    o_ck = o_c[:, None] * KP + o_k[None, :]  # [C, BK]
    o_cv = o_c[:, None] * VP + o_v[None, :]  # [C, BV]
    if p_out is not None:
        p_out += i_b * T * H * V + i_h * V
    b_s: Arg = ()  # blocks [BK, BV]
    for j in tl.static_range(KP // BK):
        m_s = (j * BK + o_k < K)[:, None] & (o_v < V)[None, :]
        b_s += (tl.load(p_start + o_s + j * BK * V, mask=m_s, other=0.0),)
    for i_c in range(chunks):
        i_n = i_row * chunks + i_c
        o_t = (i_n - i_row * chunks) * C + o_c  # [C], int64
        b_r = tl.zeros([C, BV], dtype=tl.float32)
        if p_entry is not None:
            b_r = tl.load(p_entry + i_n * (C * VP) + o_cv).to(tl.float32)  # [C, BV]
        b_o = b_r
        if p_out is not None:
            b_o = tl.load(p_own + i_n * (C * VP) + o_cv).to(tl.float32)  # [C, BV]
        for j in tl.static_range(KP // BK):
            b_operand = b_s[j].to(OPERAND)
            if p_states is not None:
                tl.store(p_states + i_n * (KP * VP) + j * BK * VP + o_kv, b_operand)
            b_weight = tl.load(p_weight + i_n * (C * KP) + j * BK + o_ck)  # [C, BK]
            b_r = tl.dot(b_weight, b_operand, b_r, input_precision=PRECISION)
            if p_out is not None:
                b_reads = tl.load(p_reads + i_n * (C * KP) + j * BK + o_ck)  # [C, BK]
                b_o = tl.dot(b_reads, b_operand, b_o, input_precision=PRECISION)
        if p_out is not None:
            store_tokens(p_out, b_o, o_t, o_v, H * V, T, V)
        b_fade = tl.load(p_fade + i_n * C + o_c)  # [C]
        b_n = (b_r * b_fade[:, None]).to(OPERAND)
        b_after: Arg = ()
        for j in tl.static_range(KP // BK):
            b_k = token_block(p_keys, o_t, j * BK + o_k, stride_kt, T, K).to(OPERAND)  # [C, BK]
            b_kept = _kept(p_whole, b_s[j], i_n, j * BK + o_k, KP, DECAY)
            b_after += (tl.dot(tl.trans(b_k), b_n, b_kept, input_precision=PRECISION),)
        b_s = b_after
    if p_end is not None:
        for j in tl.static_range(KP // BK):
            m_s = (j * BK + o_k < K)[:, None] & (o_v < V)[None, :]
            tl.store(p_end + o_s + j * BK * V, b_s[j], mask=m_s)


@triton.jit
def _backward(
    program: Arg, p_weight: Arg, p_reads: Arg, p_keys: Arg, p_fade: Arg, p_whole: Arg, p_dout: Arg,
    p_dend: Arg, p_dstates: Arg, p_dstart: Arg,
    T: Arg, H: Arg, GROUP: Arg, stride_kb: Arg, stride_kt: Arg, stride_kh: Arg,
    stride_ob: Arg, stride_ot: Arg, stride_oh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """`backward_chain_kernel`."""
    OPERAND: tl.constexpr = p_weight.dtype.element_ty
    i_v = program % (VP // BV)
    i_row = (program // (VP // BV)).to(tl.int64)
    i_b, i_h = i_row // H, i_row % H
    chunks = tl.cdiv(T, C)
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    p_keys += i_b * stride_kb + (i_h // GROUP) * stride_kh
    p_dout += i_b * stride_ob + i_h * stride_oh
    o_s = i_row * (K * V) + o_k[:, None] * V + o_v[None, :]  # [BK, BV]
    o_kv = o_k[:, None] * VP + o_v[None, :]  # [BK, BV]
    o_ck = o_c[:, None] * KP + o_k[None, :]  # [C, BK]
    b_ds: Arg = ()  # blocks [BK, BV]
    for j in tl.static_range(KP // BK):
        m_s = (j * BK + o_k < K)[:, None] & (o_v < V)[None, :]
        b_ds += (tl.load(p_dend + o_s + j * BK * V, mask=m_s, other=0.0),)
    for i_back in range(chunks):
        i_n = i_row * chunks + (chunks - 1 - i_back)
        o_t = (i_n - i_row * chunks) * C + o_c  # [C], int64
        b_x = tl.zeros([C, BV], dtype=tl.float32)
        for j in tl.static_range(KP // BK):
            b_operand = b_ds[j].to(OPERAND)
            if p_dstates is not None:
                tl.store(p_dstates + i_n * (KP * VP) + j * BK * VP + o_kv, b_operand)
            b_k = token_block(p_keys, o_t, j * BK + o_k, stride_kt, T, K).to(OPERAND)  # [C, BK]
            b_x = tl.dot(b_k, b_operand, b_x, input_precision=PRECISION)
        b_x *= tl.load(p_fade + i_n * C + o_c)[:, None]
        b_x = b_x.to(OPERAND)
        b_do = token_block(p_dout, o_t, o_v, stride_ot, T, V).to(OPERAND)  # [C, BV]
        # A loop for each factor on the right: blocks then share its registers.
        b_asked: Arg = ()
        for j in tl.static_range(KP // BK):
            b_reads = tl.load(p_reads + i_n * (C * KP) + j * BK + o_ck)  # [C, BK]
            b_kept = _kept(p_whole, b_ds[j], i_n, j * BK + o_k, KP, DECAY)
            b_asked += (tl.dot(tl.trans(b_reads), b_do, b_kept, input_precision=PRECISION),)
        b_before: Arg = ()
        for j in tl.static_range(KP // BK):
            b_weight = tl.load(p_weight + i_n * (C * KP) + j * BK + o_ck)  # [C, BK]
            b_before += (tl.dot(tl.trans(b_weight), b_x, b_asked[j], input_precision=PRECISION),)
        b_ds = b_before
    for j in tl.static_range(KP // BK):
        m_s = (j * BK + o_k < K)[:, None] & (o_v < V)[None, :]
        tl.store(p_dstart + o_s + j * BK * V, b_ds[j], mask=m_s)


@triton.jit(do_not_specialize=["T"])
def forward_chain_kernel(
    p_weight: Arg, p_entry: Arg, p_reads: Arg, p_own: Arg, p_keys: Arg, p_fade: Arg, p_whole: Arg,
    p_start: Arg, p_states: Arg, p_out: Arg, p_end: Arg,
    T: Arg, H: Arg, GROUP: Arg, stride_kb: Arg, stride_kt: Arg, stride_kh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Columns of the state of one head a program.

        S = start
        for each chunk, in order:
            states = S                                    where they are asked for
            R = entry + weight S
            out = own + reads S                           where it is asked for
            S = whole * S + keys^T (fade R)
        end = S

    start, end [B, H, K, V] float32; states [B * H, chunks, KP, VP]; out [B, T, H, V]. Without
    entry and started from the identity this is the transition.
    """
    _forward(
        tl.program_id(0), p_weight, p_entry, p_reads, p_own, p_keys, p_fade, p_whole, p_start,
        p_states, p_out, p_end, T, H, GROUP, stride_kb, stride_kt, stride_kh, K, V, KP, VP, C,
        BK, BV, DECAY, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def backward_chain_kernel(
    p_weight: Arg, p_reads: Arg, p_keys: Arg, p_fade: Arg, p_whole: Arg, p_dout: Arg, p_dend: Arg,
    p_dstates: Arg, p_dstart: Arg,
    T: Arg, H: Arg, GROUP: Arg, stride_kb: Arg, stride_kt: Arg, stride_kh: Arg,
    stride_ob: Arg, stride_ot: Arg, stride_oh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Columns of the gradient of the state of one head a program.

        dS = dend
        for each chunk, last to first:
            dstates = dS                                  where they are asked for
            X = fade (keys dS)
            dS = whole * dS + reads^T dO + weight^T X
        dstart = dS

    Shapes as in `forward_chain_kernel`; dstates: that of the state behind each chunk.
    """
    _backward(
        tl.program_id(0), p_weight, p_reads, p_keys, p_fade, p_whole, p_dout, p_dend, p_dstates,
        p_dstart, T, H, GROUP, stride_kb, stride_kt, stride_kh, stride_ob, stride_ot, stride_oh,
        K, V, KP, VP, C, BK, BV, DECAY, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "forward_programs"])
def both_chains_kernel(
    p_weight: Arg, p_entry: Arg, p_reads: Arg, p_keys: Arg, p_fade: Arg, p_whole: Arg,
    p_start: Arg, p_states: Arg, p_dout: Arg, p_dend: Arg, p_dstates: Arg, p_dstart: Arg,
    forward_programs: Arg, T: Arg, H: Arg, GROUP: Arg,
    stride_kb: Arg, stride_kt: Arg, stride_kh: Arg, stride_ob: Arg, stride_ot: Arg, stride_oh: Arg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The states before each chunk, made again, and the gradients of those behind: neither needs
    the other, and with few heads neither fills the card.

    forward_programs: as many walk forward, as many more back.
    """
    program = tl.program_id(0)
    if program < forward_programs:
        _forward(
            program, p_weight, p_entry, None, None, p_keys, p_fade, p_whole, p_start, p_states,
            None, None, T, H, GROUP, stride_kb, stride_kt, stride_kh, K, V, KP, VP, C, BK, BV,
            DECAY, PRECISION,
        )  # fmt: skip
    else:
        _backward(
            program - forward_programs, p_weight, p_reads, p_keys, p_fade, p_whole, p_dout, p_dend,
            p_dstates, p_dstart, T, H, GROUP, stride_kb, stride_kt, stride_kh, stride_ob,
            stride_ot, stride_oh, K, V, KP, VP, C, BK, BV, DECAY, PRECISION,
        )  # fmt: skip
