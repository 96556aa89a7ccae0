"""Triton: the gradient of one log decay a token, from sums that the gradients' kernels leave."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdist_kernels.launch import Config, launch
from xdist_kernels.linear.triton_chunk import load_documents
from xdist_kernels.linear.triton_shapes import CHUNK_TOKENS, cdiv, padded


@triton.jit(do_not_specialize=["T", "span", "spans", "N_Q", "N_K"])
def gate_gradients(
    q_rows: tl.tensor, k_rows: tl.tensor, states: tl.tensor, dstates: tl.tensor, ids: tl.tensor,
    dg: tl.tensor, N_Q: tl.tensor, N_K: tl.tensor, B: tl.tensor, T: tl.tensor, H: tl.tensor,
    span: tl.tensor, spans: tl.tensor, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, MIRRORED: tl.constexpr,
) -> None:  # fmt: skip
    # e = <S, dS> behind the span
    # for chunks from the last:  dg = sum over later tokens of (q . dq - k . dk) + e, of a document
    #                            e = dg at the chunk's first token
    # MIRRORED: before the span, from the first chunk, over earlier tokens, at the last token
    i_p = tl.program_id(0).to(tl.int64)
    i_h = i_p % H
    i_s = i_p // H % spans
    i_b = i_p // H // spans
    i_bh = i_b * H + i_h

    o_i = tl.arange(0, BT)
    e = 0.0
    for i_k in range(tl.cdiv(K, BK)):
        for i_v in range(tl.cdiv(V, BV)):
            o_k = i_k * BK + tl.arange(0, BK)
            o_v = i_v * BV + tl.arange(0, BV)
            inside = (o_k < K)[:, None] & (o_v < V)[None, :]
            i_border = i_bh * (spans + 1) + i_s + (0 if MIRRORED else 1)
            o_s = i_border * K * V + o_k[:, None] * V + o_v[None, :]
            b_s = tl.load(states + o_s, mask=inside, other=0.0)  # [BK, BV]
            b_ds = tl.load(dstates + o_s, mask=inside, other=0.0)  # [BK, BV]
            e += tl.sum(tl.sum(b_s * b_ds, 1), 0)
    begin = i_s * span
    n_c = tl.cdiv(tl.minimum(span, T - begin), BT).to(tl.int32)
    for i in range(n_c):
        first = begin + (i if MIRRORED else n_c - 1 - i) * BT
        o_t = first + o_i
        m_t = o_t < T
        b_own = tl.zeros([BT], dtype=tl.float32)
        for n in range(N_Q):
            b_own += tl.load(q_rows + (n * B * H + i_bh) * T + o_t, mask=m_t, other=0.0)
        for n in range(N_K):
            b_own -= tl.load(k_rows + (n * B * H + i_bh) * T + o_t, mask=m_t, other=0.0)
        ahead = o_i[:, None] - o_i[None, :]
        later = (ahead >= 0) if MIRRORED else (ahead <= 0)
        reaches = m_t
        # The token next to the chunk that comes afterwards.
        edge = tl.minimum(BT, T - first) - 1 if MIRRORED else 0
        if ids is not None:
            b_id, before, last = load_documents(ids, first, o_t, T, BT)
            later = later & (b_id[:, None] == b_id[None, :])
            if MIRRORED:
                last = tl.load(ids + first)
                before = tl.load(ids + tl.minimum(first + BT, T - 1))
            reaches = b_id == last
        b_dg = tl.sum(tl.where(later, b_own[None, :], 0.0), 1) + tl.where(reaches, e, 0.0)
        tl.store(dg + (i_b * T + o_t) * H + i_h, b_dg, mask=m_t)
        e = tl.sum(tl.where(o_i == edge, b_dg, 0.0), 0)
        if ids is not None:
            e = tl.where(tl.sum(tl.where(o_i == edge, b_id, 0), 0) == before, e, 0.0)


def gate(
    q_rows: Tensor,
    k_rows: Tensor,
    borders: tuple[Tensor, Tensor],
    ids: Tensor | None,
    *,
    span: int,
    mirrored: bool = False,
) -> Tensor:
    """dlog_decay [B,T,H,1] float32; mirrored: of a recurrence from the last token to the first.

    q_rows, k_rows [blocks,B,H,T]: q . dq and k . dk; borders: states and their gradients
    [B,H,spans+1,K,V].
    """
    _, batch, heads, tokens = q_rows.shape
    key_dim, width = borders[0].shape[3:]
    spans = cdiv(tokens, span)
    dg = torch.empty((batch, tokens, heads, 1), dtype=torch.float32, device=q_rows.device)
    launch(
        gate_gradients, batch * heads * spans, Config(4, 1), device=dg.device,
        q_rows=q_rows, k_rows=k_rows, states=borders[0], dstates=borders[1], ids=ids, dg=dg,
        N_Q=q_rows.shape[0], N_K=k_rows.shape[0], B=batch, T=tokens, H=heads, span=span,
        spans=spans, K=key_dim, V=width, BT=CHUNK_TOKENS,
        BK=min(padded(key_dim), 64), BV=min(padded(width), 64), MIRRORED=mirrored,
    )  # fmt: skip
    return dg
