"""Gated linear attention by a loop over tokens, in float64: the definition, for tests.

S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T
o_t = scale * S_t^T q_t
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B,n,H,V] and final state, both float64, differentiable by autograd.

    q, k [B,n,Hk,K], v [B,n,H,V] with H % Hk == 0; log_decay None, [H], [B,n,H] or [B,n,H,K];
    scale None is K**-0.5. Without `cu_seqlens` states are [B,H,K,V]; with it each document
    starts from its own initial state (zero when None) and states are [B,documents,H,K,V].
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, n, heads, width = v.shape
    group = heads // q.shape[2]
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    key_dim = q.shape[-1]
    scale = key_dim**-0.5 if scale is None else scale
    decay = torch.ones(1, dtype=torch.float64, device=q.device)
    if log_decay is not None:
        decay = log_decay.double().exp()
    if decay.dim() < 4:
        decay = decay[..., None]
    decay = decay.expand(batch, n, heads, key_dim)

    cuts = (0, n) if cu_seqlens is None else cu_seqlens
    starts = q.new_zeros(batch, len(cuts) - 1, heads, key_dim, width)
    if initial_state is not None:
        shaped = initial_state if cu_seqlens is not None else initial_state[:, None]
        starts = starts + shaped.double()
    outs, finals = [], []
    for document in range(len(cuts) - 1):
        state = starts[:, document]
        for t in range(cuts[document], cuts[document + 1]):
            state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        finals.append(state)
    out = torch.stack(outs, 1) if outs else torch.zeros_like(v)
    final = torch.stack(finals, 1)
    return out, final if cu_seqlens is not None else final[:, 0]
