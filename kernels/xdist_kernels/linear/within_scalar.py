"""Inside chunks, without decay or with one decay per token and head: one masked product.

With c = cumulative log decay in the chunk, and D_ij = exp(c_i - c_j) for j <= i, else 0:

    O = (Q K^T * D) V            never a quotient of two products

Shapes: q, k [R,C,K], v, dout [R,C,V] (chunks.py); c [R,C,1] to base 2, None without decay.
Products run in the dtype of q. Nothing here depends on data: torch.compile traces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.linear.chunks import DocumentIds, state_dtype


def _within(q: Tensor, c: Tensor | None, ids: DocumentIds | None) -> Tensor:
    """D, [R, C, C] or [C, C], in the dtype of q."""
    chunk = q.shape[1]
    wide = state_dtype(q)
    visible = torch.ones(chunk, chunk, dtype=wide, device=q.device).tril()
    if ids is not None:
        visible = visible * ids.same()
    if c is None:
        visible = visible.to(q.dtype)
        return visible if ids is None else visible.repeat(q.shape[0] // visible.shape[0], 1, 1)
    # Above the diagonal the exponent is positive and could overflow: cut before the power.
    within = (c - c.mT).clamp_(max=0.0).exp2_()
    if ids is not None:
        within = within.view(-1, *visible.shape)
    return within.mul_(visible).view(-1, chunk, chunk).to(q.dtype)


def outputs(q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, ids: DocumentIds | None) -> Tensor:
    """O [R,C,V], without the scale and without what a state before the chunk adds."""
    return torch.bmm(torch.bmm(q, k.mT).mul_(_within(q, c, ids)), v)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, c: Tensor | None, ids: DocumentIds | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [R,C,K] and dv [R,C,V] of `outputs`, in the dtype of q."""
    within = _within(q, c, ids)
    scores = torch.bmm(dout, v.mT).mul_(within)
    dq, dk = torch.bmm(scores, k), torch.bmm(scores.mT, q)
    scores = torch.bmm(q, k.mT).mul_(within)
    return dq, dk, torch.bmm(scores.mT, dout)
