"""Inside chunks, without decay or with one decay per token and head: one masked product.

With c = cumulative log decay g in the chunk, and D_ij = exp(c_i - c_j) for j <= i, else 0:

    O = (Q K^T * D) V            never a quotient of two products (halves.py)

Shapes: q, k [R,C,K], v, dout [R,C,V] (chunks.py); g [R,C,1] to base 2, None without decay.
Products run in the dtype of q. Nothing here depends on data: torch.compile traces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.linear.chunks import DocumentIds
from xdist_kernels.linear.halves import within


def _within(q: Tensor, g: Tensor | None, ids: DocumentIds | None) -> Tensor:
    """D, [R, C, C] or [C, C], in the dtype of q."""
    rows, chunk, _ = q.shape
    if g is not None:
        found = within(g, q.dtype)
        if ids is not None:
            same = ids.same()
            found.view(-1, *same.shape).mul_(same)
        return found
    visible = torch.ones(chunk, chunk, dtype=q.dtype, device=q.device).tril()
    if ids is None:
        return visible
    visible = visible * ids.same()
    return visible.repeat(rows // visible.shape[0], 1, 1)


def outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, ids: DocumentIds | None) -> Tensor:
    """O [R,C,V], without the scale and without what a state before the chunk adds."""
    return torch.bmm(torch.bmm(q, k.mT).mul_(_within(q, g, ids)), v)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, g: Tensor | None, ids: DocumentIds | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [R,C,K] and dv [R,C,V] of `outputs`, in the dtype of q."""
    between = _within(q, g, ids)
    scores = torch.bmm(dout, v.mT).mul_(between)
    dq, dk = torch.bmm(scores, k), torch.bmm(scores.mT, q)
    scores = torch.bmm(q, k.mT).mul_(between)
    return dq, dk, torch.bmm(scores.mT, dout)
