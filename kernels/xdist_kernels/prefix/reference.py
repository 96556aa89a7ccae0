"""Prefix attention by a loop over tokens, in float64: the definition, for tests.

o_t = softmax_{i<=t}(scale * q . k_i) v_i, each document for itself
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def prefix_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens: tuple[int, ...] | None = None,
) -> Tensor:
    """o [B,n,H,V] float64 from q [H,D], k [B,n,H,D], v [B,n,H,V]; differentiable by autograd."""
    scores = scale * (k.double() * q.double()).sum(-1)  # [B, n, H]
    v = v.double()
    cuts = (0, k.shape[1]) if cu_seqlens is None else cu_seqlens
    outs = []
    for start, stop in itertools.pairwise(cuts):
        for t in range(start, stop):
            weights = scores[:, start : t + 1].softmax(1)
            outs.append((weights.unsqueeze(-1) * v[:, start : t + 1]).sum(1))
    return torch.stack(outs, 1) if outs else v
