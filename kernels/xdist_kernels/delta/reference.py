"""The delta rule by a loop over tokens, in float64: the definition, for tests.

Written as in Yang et al., "Gated Delta Networks" (2024), eq. 10, with a decay per key dim as in
"Kimi Linear" (2025), eq. 1; without decay it is DeltaNet (Schlag et al. 2021).

1. S  <- diag(exp(log_decay_t)) S                 forget
2. u_t = beta_t (v_t - S^T k_t)                   what the key's old value lacks
3. S  <- S + k_t u_t^T                            write
4. o_t = scale * S^T q_t                          read
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B,n,H,V] and final state, both float64, differentiable by autograd.

    q, k [B,n,Hk,K], v [B,n,H,V] with H % Hk == 0, beta [B,n,H]; log_decay None, [H], [B,n,H] or
    [B,n,H,K]; scale None is K**-0.5. Without `cu_seqlens` states are [B,H,K,V]; with it each
    document starts from its own initial state (zero when None) and states are
    [B,documents,H,K,V].
    """
    q, k, v, beta = q.double(), k.double(), v.double(), beta.double()
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
    states = q.new_zeros(batch, len(cuts) - 1, heads, key_dim, width)
    if initial_state is not None:
        shaped = initial_state if cu_seqlens is not None else initial_state[:, None]
        states = states + shaped.double()
    outs, finals = [], []
    for document in range(len(cuts) - 1):
        state = states[:, document]
        for t in range(cuts[document], cuts[document + 1]):
            key = k[:, t]
            state = decay[:, t, ..., None] * state  # 1
            lacks = v[:, t] - torch.einsum("bhk,bhkv->bhv", key, state)
            write = beta[:, t, :, None] * lacks  # 2
            state = state + key[..., None] * write[..., None, :]  # 3
            outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))  # 4
        finals.append(state)
    out = torch.stack(outs, 1) if outs else torch.zeros_like(v)
    final = torch.stack(finals, 1)
    return out, final if cu_seqlens is not None else final[:, 0]
