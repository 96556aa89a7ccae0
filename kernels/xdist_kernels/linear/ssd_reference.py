"""State-space duality (Mamba-2) by a loop over tokens, in float64: the definition, for tests.

h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T
y_t = C_t^T h_t + D x_t
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B,n,H,D] and final state, both float64, differentiable by autograd.

    x [B,n,H,D], dt [B,n,H], A and D [H], B and C [B,n,G,N] with H % G == 0. Without `cu_seqlens`
    states are [B,H,N,D]; with it each document starts from its own initial state (zero when None)
    and states are [B,documents,H,N,D].
    """
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    batch, n, heads, width = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    cuts = (0, n) if cu_seqlens is None else cu_seqlens
    starts = torch.zeros(batch, len(cuts) - 1, heads, B.shape[3], width, dtype=x.dtype)
    if initial_state is not None:
        shaped = initial_state if cu_seqlens is not None else initial_state[:, None]
        starts = starts + shaped.double()
    rows, finals = [], []
    for document in range(len(cuts) - 1):
        h = starts[:, document]
        for t in range(cuts[document], cuts[document + 1]):
            step = dt[:, t, :, None, None]
            h = (step * A[:, None, None]).exp() * h + step * B[:, t, :, :, None] * x[:, t, :, None]
            y = (C[:, t, :, :, None] * h).sum(2)
            rows.append(y if D is None else y + D.double()[:, None] * x[:, t])
        finals.append(h)
    out = torch.stack(rows, 1) if rows else torch.zeros_like(x)
    final = torch.stack(finals, 1)
    return out, final if cu_seqlens is not None else final[:, 0]
