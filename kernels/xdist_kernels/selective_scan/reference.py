"""The selective scan by a loop over tokens, in float64: the definition, for tests.

h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = <C_t, h_t>
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """y [B,n,C] and the final states [B,documents,C,N], float64, differentiable by autograd.

    u, delta [B,n,C], A [C,N], B, C [B,n,N]; initial_state [B,documents,C,N] (or [B,C,N] for one
    document). `reverse` walks every document from its end to its start.
    """
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    batch, n, channels = u.shape
    cuts = (0, n) if cu_seqlens is None else cu_seqlens
    shape = (batch, len(cuts) - 1, channels, A.shape[1])
    given = u.new_zeros(shape) if initial_state is None else initial_state.double().reshape(shape)
    outs: dict[int, Tensor] = {}
    finals = []
    for document, (start, stop) in enumerate(itertools.pairwise(cuts)):
        h = given[:, document]
        tokens = range(start, stop)
        for t in reversed(tokens) if reverse else tokens:
            step = delta[:, t, :, None]  # [B, C, 1]
            h = torch.exp(step * A) * h + step * u[:, t, :, None] * B[:, t, None, :]
            outs[t] = (h * C[:, t, None, :]).sum(-1)
        finals.append(h)
    return torch.stack([outs[t] for t in range(n)], 1) if n else u, torch.stack(finals, 1)
