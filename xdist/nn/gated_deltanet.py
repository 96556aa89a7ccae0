"""Gated DeltaNet: the delta rule with one decay per head.

S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = K^-0.5 q_t^T S_t
g = -exp(A_log) softplus(x Wa + dt_bias);   y = (norm(o) * silu(x Wg)) Wo
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.decay import softplus_decay, wide
from xdist.nn.head_norm import HeadNorm, unit
from xdist.nn.heads import heads_of, scaled_dim, shared_heads, split
from xdist.nn.initial import matrix, rate_log, step_bias, taps


class GatedDeltaNet(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H value heads share key_heads key heads.

    Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", equation 10 and
    figure 1: q, k, v = silu(conv(x W)), q and k of unit length, decay as in Mamba-2. K is head_dim,
    V is expand_v x head_dim. negative_eigenvalues: beta in (0, 2). eps: of the output norm.
    The same layer as Qwen3-Next's, Qwen3.5's and OLMo-Hybrid's (xdist.nn.from_transformers).

    Parameters: qkv [2 Hk K + H V, C], conv [2 Hk K + H V, W], beta [H, C], decay [H, C],
    A_log [H], dt_bias [H], gate [H V, C], norm.weight [V], out [C, H V].
    Moves: the halo of the convolution, and what `xdist.delta_rule` moves for [B, H, K, V].

    Raises:
        ConfigError: head_dim does not divide dim, or key_heads not the heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        heads: int | None = None,
        key_heads: int | None = None,
        expand_v: float = 1.0,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        eps: float = 1e-6,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.key_dim = heads_of("gated_deltanet", dim, head_dim, heads), head_dim
        self.key_heads = shared_heads("gated_deltanet", self.heads, key_heads)
        self.value_dim = scaled_dim("gated_deltanet", head_dim, expand_v)
        self.reach = 2.0 if negative_eigenvalues else 1.0
        self.strategy = strategy
        values = self.heads * self.value_dim
        mixed = 2 * self.key_heads * self.key_dim + values
        self.qkv, self.conv = matrix(mixed, dim), taps(mixed, conv_width)
        self.beta, self.decay = matrix(self.heads, dim), matrix(self.heads, dim)
        self.A_log = nn.Parameter(rate_log(self.heads))
        self.dt_bias = nn.Parameter(step_bias(self.heads))
        self.gate = matrix(values, dim)
        self.norm = HeadNorm(self.value_dim, eps=eps)
        self.out = matrix(dim, values)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        keys, values = (self.key_heads, self.key_dim), (self.heads, self.value_dim)
        qkv = ops.causal_conv1d(F.linear(x, self.qkv), self.conv, None, shard, activation="silu")
        q, k, v = split(qkv, keys, keys, values)
        beta = self.reach * torch.sigmoid(wide(F.linear(x, self.beta)))
        decay = softplus_decay(F.linear(x, self.decay), self.A_log, self.dt_bias)
        y = ops.delta_rule(
            unit(q), unit(k), v, beta, shard, log_decay=decay, strategy=self.strategy
        )
        assert isinstance(y, Tensor)
        y = self.norm(y, F.linear(x, self.gate).unflatten(-1, values))
        return F.linear(y.flatten(2), self.out)
