"""Triton: what a decay of its own for every key dim needs beside the kernels of one decay a token.

`weigh` turns queries and keys into ones that hold the decays to their chunk's borders, and sums up
what is inside chunks; then the kernels of triton_states.py and triton_scan.py serve. Gradients of
q, k and log_decay come from one kernel of their own. No exponent is ever positive: inside a chunk
each pair of tokens meets at the middle of the smallest aligned block that holds both (README.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdist_kernels.launch import launch
from xdist_kernels.linear.triton_chunk import load_documents, load_rows, to_base_2
from xdist_kernels.linear.triton_shapes import (
    cdiv,
    chunk_tokens,
    gradient_blocks,
    key_blocks,
    precision,
)
from xdist_kernels.linear.triton_states import strides


class Weighed(NamedTuple):
    """Queries and keys with the decays of their chunks; None where not asked for."""

    q: Tensor | None  # [B, T, H, K] scale * q * exp(c), 0 where a document starts before it
    k: Tensor | None  # [B, T, H, K] k * exp(c_C - c), 0 where one starts behind it
    totals: Tensor  # [B, H, chunks, K] c_C to base 2, -inf where a document starts in the chunk
    inner: Tensor | None  # [B, H, chunks, C, C] scale * sum over d of q k exp(c_i - c_j), j <= i


@triton.jit
def halves_of(o_i: tl.tensor, i_level: tl.tensor) -> Any:
    """Of each token's block of 2h tokens, h = 2^level: its number, whether the token is in its
    second half, and the last token of its other half."""
    block = o_i >> (i_level + 1)
    second = ((o_i >> i_level) & 1) == 1
    sibling = (o_i >> i_level) ^ 1
    return block, second, ((sibling + 1) << i_level) - 1


@triton.jit
def joined(
    b_c: tl.tensor, b_r: tl.tensor, second: tl.tensor, other: tl.tensor, BT: tl.constexpr,
    BK: tl.constexpr,
) -> Any:  # fmt: skip
    """From halves to their blocks: the log decays [BT, BK] b_c from the start of a token's half,
    and b_r from behind the token to its end. Sums of one sign, never a difference of sums, which
    would lose what stands beside a strong decay."""
    b_other = tl.gather(b_c, tl.broadcast_to(other[:, None], (BT, BK)), 0)
    b_c += tl.where(second[:, None], b_other, 0.0)
    b_r += tl.where(second[:, None], 0.0, b_other)
    return b_c, b_r


@triton.jit
def meets(block: tl.tensor, second: tl.tensor) -> Any:
    """[BT, BT] a query of the second half of a block and a key of its first half."""
    same = block[:, None] == block[None, :]
    return same & second[:, None] & (second[None, :] == 0)


@triton.jit(do_not_specialize=["T"])
def weigh_chunks(
    q: tl.tensor, k: tl.tensor, g: tl.tensor, ids: tl.tensor, q_weighed: tl.tensor,
    k_weighed: tl.tensor, totals: tl.tensor, inner: tl.tensor, q_b: tl.tensor, q_t: tl.tensor,
    q_h: tl.tensor, q_group: tl.tensor, k_b: tl.tensor, k_t: tl.tensor, k_h: tl.tensor,
    k_group: tl.tensor, g_b: tl.tensor, g_t: tl.tensor, g_h: tl.tensor, T: tl.tensor, H: tl.tensor,
    scale: tl.tensor, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # of one chunk of one head, c = cumsum(g):
    #     for blocks of key dims:
    #         q' = scale * q * exp(c);  k' = k * exp(c_C - c)
    #         A += diag(q . k)
    #         for halves h = 1 .. C/2, m = the middle of a token's block of 2h:
    #             f = exp(-|c - c_m|)
    #             A += (q * f) (k * f)^T, of second and first halves of the same block
    #     A = scale * A, where both tokens are of one document
    i_p = tl.program_id(0).to(tl.int64)
    n_c = tl.cdiv(T, BT)
    i_h = i_p % H
    i_c = i_p // H % n_c
    i_b = i_p // H // n_c
    i_chunk = (i_b * H + i_h) * n_c + i_c

    o_i = tl.arange(0, BT)
    first = i_c * BT
    o_t = first + o_i
    m_t = o_t < T
    since = tl.full([BT], 1.0, tl.float32)
    until = since
    gone = 0.0
    visible = o_i[:, None] >= o_i[None, :]
    if ids is not None:
        b_id, before, last = load_documents(ids, first, o_t, T, BT)
        visible = visible & (b_id[:, None] == b_id[None, :])
        since = tl.where(b_id == before, 1.0, 0.0)
        until = tl.where(b_id == last, 1.0, 0.0)
        gone = tl.where(last == before, 0.0, float("-inf"))
    o_head = ((i_b * T + o_t) * H + i_h) * K  # [BT]
    b_a = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = m_t[:, None] & (o_k < K)[None, :]
        p_g = g + i_b * g_b + i_h * g_h
        b_g = to_base_2(load_rows(p_g, o_t, m_t, o_k, g_t, K))  # [BT, BK]
        b_total = tl.sum(b_g, 0)  # [BK]
        tl.store(totals + i_chunk * K + o_k, b_total + gone, mask=o_k < K)
        o_out = o_head[:, None] + o_k[None, :]
        if k is not None:
            p_k = k + i_b * k_b + i_h // k_group * k_h
            b_k = load_rows(p_k, o_t, m_t, o_k, k_t, K).to(tl.float32)
            m_next = (o_i < BT - 1) & (o_t + 1 < T)
            b_next = to_base_2(load_rows(p_g, o_t + 1, m_next, o_k, g_t, K))
            b_kw = b_k * tl.exp2(tl.cumsum(b_next, 0, reverse=True)) * until[:, None]
            tl.store(k_weighed + o_out, b_kw.to(k_weighed.dtype.element_ty), mask=m_k)
        if q is not None:
            p_q = q + i_b * q_b + i_h // q_group * q_h
            b_q = load_rows(p_q, o_t, m_t, o_k, q_t, K).to(tl.float32)
            b_qw = b_q * tl.exp2(tl.cumsum(b_g, 0)) * since[:, None] * scale
            tl.store(q_weighed + o_out, b_qw.to(q_weighed.dtype.element_ty), mask=m_k)
        if inner is not None:
            own = tl.sum(b_q * b_k, 1)  # [BT]
            b_a += tl.where(o_i[:, None] == o_i[None, :], own[:, None], 0.0)
            b_c = b_g
            b_r = tl.zeros([BT, BK], dtype=tl.float32)
            for i_level in range(LEVELS):
                block, second, other = halves_of(o_i, i_level)
                b_f = tl.exp2(tl.where(second[:, None], b_c, b_r))  # [BT, BK]
                b_qf = (b_q * b_f).to(inner.dtype.element_ty)
                b_kf = (b_k * b_f).to(inner.dtype.element_ty)
                b_level = tl.dot(b_qf, tl.trans(b_kf), input_precision=PRECISION)
                b_a += tl.where(meets(block, second), b_level, 0.0)
                b_c, b_r = joined(b_c, b_r, second, other, BT, BK)
    if inner is not None:
        b_a = tl.where(visible, b_a * scale, 0.0)
        p_a = inner + i_chunk * BT * BT + o_i[:, None] * BT + o_i[None, :]
        tl.store(p_a, b_a.to(inner.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "span", "spans"])
def gradients_of_keys(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, dout: tl.tensor, g: tl.tensor, ids: tl.tensor,
    states: tl.tensor, dstates: tl.tensor, dq_before: tl.tensor, dq: tl.tensor, dk: tl.tensor,
    dg: tl.tensor, q_b: tl.tensor, q_t: tl.tensor, q_h: tl.tensor, q_group: tl.tensor,
    k_b: tl.tensor, k_t: tl.tensor, k_h: tl.tensor, k_group: tl.tensor, v_b: tl.tensor,
    v_t: tl.tensor, v_h: tl.tensor, v_group: tl.tensor, d_b: tl.tensor, d_t: tl.tensor,
    d_h: tl.tensor, d_group: tl.tensor, g_b: tl.tensor, g_t: tl.tensor, g_h: tl.tensor,
    T: tl.tensor, H: tl.tensor, span: tl.tensor, spans: tl.tensor, scale: tl.tensor,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # dS [BK, V] = the gradient of the state behind the span; e = rowsum(S * dS) there
    # for chunks from the last, c = cumsum(g):
    #     dA = scale * dO V^T, below and on the diagonal
    #     dQ = scale * exp(c) * (dO S^T) + diag(dA) K;   dK = exp(c_C - c) * (V dS^T) + diag(dA) Q
    #     for halves h, f = exp(-|c - c_m|) and blocks as above, B = dA of second and first halves:
    #         dQ += f * (B (k * f));  dK += f * (B^T (q * f))
    #     dg = sum over later tokens of (q * dQ - k * dK) + e;   e = dg at the chunk's first token
    #     dS = exp(c_C) dS + (scale * q * exp(c))^T dO
    n_k = tl.cdiv(K, BK)
    i_p = tl.program_id(0).to(tl.int64)
    i_k = i_p % n_k
    i_h = i_p // n_k % H
    i_s = i_p // n_k // H % spans
    i_b = i_p // n_k // H // spans
    i_bh = i_b * H + i_h

    o_i = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    p_q = q + i_b * q_b + i_h // q_group * q_h
    p_k = k + i_b * k_b + i_h // k_group * k_h
    p_v = v + i_b * v_b + i_h // v_group * v_h
    p_d = dout + i_b * d_b + i_h // d_group * d_h
    o_s = (i_bh * (spans + 1) + i_s + 1) * K * V + o_k[:, None] * V + o_v[None, :]
    inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_ds = tl.load(dstates + o_s, mask=inside, other=0.0)  # [BK, BV]
    b_e = tl.sum(b_ds * tl.load(states + o_s, mask=inside, other=0.0), 1)  # [BK]
    diagonal = o_i[:, None] == o_i[None, :]
    begin = i_s * span
    n_c = tl.cdiv(tl.minimum(span, T - begin), BT).to(tl.int32)
    for i in range(n_c):
        first = begin + (n_c - 1 - i) * BT
        o_t = first + o_i
        m_t = o_t < T
        m_k = m_t[:, None] & (o_k < K)[None, :]
        o_out = (((i_b * T + o_t) * H + i_h) * K)[:, None] + o_k[None, :]
        visible = o_i[:, None] >= o_i[None, :]
        seen = o_i[:, None] <= o_i[None, :]
        b_c = to_base_2(load_rows(g + i_b * g_b + i_h * g_h, o_t, m_t, o_k, g_t, K))  # [BT, BK]
        b_r = tl.zeros([BT, BK], dtype=tl.float32)
        b_total = tl.sum(b_c, 0)  # [BK]
        if ids is not None:
            b_id, before, last = load_documents(ids, first, o_t, T, BT)
            visible = visible & (b_id[:, None] == b_id[None, :])
            seen = seen & (b_id[:, None] == b_id[None, :])

        b_q = load_rows(p_q, o_t, m_t, o_k, q_t, K)  # [BT, BK]
        b_k = load_rows(p_k, o_t, m_t, o_k, k_t, K)  # [BT, BK]
        b_v = load_rows(p_v, o_t, m_t, o_v, v_t, V)  # [BT, BV]
        b_do = load_rows(p_d, o_t, m_t, o_v, d_t, V)  # [BT, BV]
        b_da = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BT, BT]
        b_da = tl.where(visible, b_da * scale, 0.0)
        # dA^T by a product of its own: Triton 3.4 to 3.7.0 turn a product's block wrongly on Hopper
        # in another project's kernel of this kind.
        b_dat = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BT, BT]
        b_dat = tl.where(seen, b_dat * scale, 0.0)
        own = tl.sum(tl.where(diagonal, b_da, 0.0), 1)[:, None]
        b_dq = own * b_k
        b_dk = own * b_q
        for i_level in range(LEVELS):
            block, second, other = halves_of(o_i, i_level)
            b_f = tl.exp2(tl.where(second[:, None], b_c, b_r))  # [BT, BK]
            b_level = tl.where(meets(block, second), b_da, 0.0).to(b_q.dtype)
            b_kf = (b_k * b_f).to(b_q.dtype)
            b_dq += b_f * tl.dot(b_level, b_kf, input_precision=PRECISION)
            b_qf = (b_q * b_f).to(b_q.dtype)
            b_turned = tl.where(meets(block, second == 0), b_dat, 0.0).to(b_q.dtype)
            b_dk += b_f * tl.dot(b_turned, b_qf, input_precision=PRECISION)
            b_c, b_r = joined(b_c, b_r, second, other, BT, BK)

        # What the borders' states give comes behind the loop: it would fill registers inside.
        b_since = tl.exp2(b_c) * scale
        b_until = tl.exp2(b_r)
        b_keep = tl.exp2(b_total)
        if ids is not None:
            b_since = tl.where((b_id == before)[:, None], b_since, 0.0)
            b_until = tl.where((b_id == last)[:, None], b_until, 0.0)
            b_keep = tl.where(last == before, b_keep, 0.0)
        b_dq += tl.load(dq_before + o_out, mask=m_k, other=0.0).to(tl.float32) * b_since
        b_dk += tl.dot(b_v, tl.trans(b_ds.to(b_v.dtype)), input_precision=PRECISION) * b_until
        tl.store(dq + o_out, b_dq.to(dq.dtype.element_ty), mask=m_k)
        tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m_k)

        b_dg = tl.cumsum(b_q * b_dq - b_k * b_dk, 0, reverse=True)  # [BT, BK]
        if ids is not None:
            # Sums of the documents behind a token's own are taken away again; what comes from
            # behind the chunk is for the last document alone.
            behind = tl.sum((b_id[None, :] <= b_id[:, None]).to(tl.int32), 1)  # [BT] their start
            at = tl.broadcast_to(tl.minimum(behind, BT - 1)[:, None], (BT, BK))
            b_later = tl.gather(b_dg, at, 0)
            b_dg += tl.where((behind < BT)[:, None], -b_later, b_e[None, :])
        else:
            b_dg += b_e[None, :]
        tl.store(dg + o_out, b_dg, mask=m_k)
        b_e = tl.sum(tl.where((o_i == 0)[:, None], b_dg, 0.0), 0)
        if ids is not None:
            b_e = tl.where(tl.sum(tl.where(o_i == 0, b_id, 0), 0) == before, b_e, 0.0)
        b_qw = (b_q * b_since).to(b_q.dtype)
        b_ds = tl.dot(tl.trans(b_qw), b_do, acc=b_ds * b_keep[:, None], input_precision=PRECISION)


def weigh(
    q: Tensor | None,
    k: Tensor | None,
    log_decay: Tensor,
    ids: Tensor | None,
    *,
    scale: float,
    chunk: int,
    inner: bool,
) -> Weighed:
    """Queries and keys [B,T,Hk,K] weighed by log_decay [B,T,H,K], each where it is given.

    chunk: tokens of one; inner: also what is inside chunks; needs both.
    """
    like = q if q is not None else k
    assert like is not None
    batch, tokens, heads, key_dim = log_decay.shape
    chunks = cdiv(tokens, chunk)
    totals = torch.empty((batch, heads, chunks, key_dim), dtype=torch.float32, device=like.device)
    found = [None if x is None else torch.empty(
        log_decay.shape, dtype=x.dtype, device=x.device
    ) for x in (q, k)]  # fmt: skip
    scores = None
    if inner:
        scores = like.new_empty((batch, heads, chunks, chunk, chunk))
    blocks = key_blocks(key_dim, like)
    q_b, q_t, q_h, q_group = strides(like if q is None else q, heads)
    k_b, k_t, k_h, k_group = strides(like if k is None else k, heads)
    launch(
        weigh_chunks, batch * heads * chunks, blocks.config, device=like.device,
        q=q, k=k, g=log_decay, ids=ids, q_weighed=found[0], k_weighed=found[1], totals=totals,
        inner=scores, q_b=q_b, q_t=q_t, q_h=q_h, q_group=q_group,
        k_b=k_b, k_t=k_t, k_h=k_h, k_group=k_group,
        g_b=log_decay.stride(0), g_t=log_decay.stride(1), g_h=log_decay.stride(2),
        T=tokens, H=heads, scale=scale, K=key_dim, BT=chunk, BK=blocks.first,
        LEVELS=chunk.bit_length() - 1, PRECISION=precision(like),
    )  # fmt: skip
    return Weighed(found[0], found[1], totals, scores)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    log_decay: Tensor,
    ids: Tensor | None,
    borders: tuple[Tensor, Tensor],
    dq_before: Tensor,
    *,
    span: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [B,T,H,K] in q's dtype, a value head each, and dlog_decay [B,T,H,K] float32.

    borders: states and their gradients [B,H,spans+1,K,V]; dq_before [B,T,H,K]: what the state
    before each chunk gives, without decays and scale.
    """
    batch, tokens, heads, key_dim = log_decay.shape
    width = v.shape[3]
    spans = cdiv(tokens, span)
    blocks, chunk = gradient_blocks(key_dim, width, q), chunk_tokens(q, max(key_dim, width))
    dq, dk = (torch.empty(log_decay.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    dg = torch.empty(log_decay.shape, dtype=torch.float32, device=q.device)
    q_b, q_t, q_h, q_group = strides(q, heads)
    k_b, k_t, k_h, k_group = strides(k, heads)
    v_b, v_t, v_h, v_group = strides(v, heads)
    d_b, d_t, d_h, d_group = strides(dout, heads)
    launch(
        gradients_of_keys, batch * heads * spans * cdiv(key_dim, blocks.first), blocks.config,
        device=q.device, q=q, k=k, v=v, dout=dout, g=log_decay, ids=ids,
        states=borders[0], dstates=borders[1], dq_before=dq_before, dq=dq, dk=dk, dg=dg,
        q_b=q_b, q_t=q_t, q_h=q_h, q_group=q_group, k_b=k_b, k_t=k_t, k_h=k_h, k_group=k_group,
        v_b=v_b, v_t=v_t, v_h=v_h, v_group=v_group, d_b=d_b, d_t=d_t, d_h=d_h, d_group=d_group,
        g_b=log_decay.stride(0), g_t=log_decay.stride(1), g_h=log_decay.stride(2),
        T=tokens, H=heads, span=span, spans=spans, scale=scale, K=key_dim, V=width,
        BT=chunk, BK=blocks.first, BV=blocks.second, LEVELS=chunk.bit_length() - 1,
        PRECISION=precision(q),
    )  # fmt: skip
    return dq, dk, dg
