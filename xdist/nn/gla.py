"""Gated linear attention: a decay for each key channel, from a low-rank gate.

alpha_t = sigmoid(x W1 W2 + b)^(1/16);   S_t = diag(alpha_t) S_{t-1} + k_t v_t^T
y = (norm(K^-0.5 q_t^T S_t) * silu(x Wr)) Wo
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.decay import sigmoid_decay
from xdist.nn.head_norm import HeadNorm
from xdist.nn.heads import heads_of, scaled_dim, split
from xdist.nn.initial import matrix, taps


class GLA(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; V = head_dim, K = expand_k x head_dim.

    Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training",
    section 4.4: half as many key channels as value channels, a gate of rank 16, its temperature
    gate_normaliser 16, an RMS norm of each head and a swish gate. conv_width: a causal convolution
    and SiLU over q, k and v before; 0, as published, is none.

    Parameters: qkv [H (2K + V), C], gate_down [rank, C], gate_up [H K, rank], gate_bias [H K],
    gate [H V, C], norm.weight [V], out [C, H V]; conv [H (2K + V), W] where there is one.
    Moves: the scan's state and decay, [B, H, K, V] and [B, H, K]; the halo of a convolution.

    Raises:
        ConfigError: head_dim does not divide dim, or expand_k makes no whole number of it.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        heads: int | None = None,
        expand_k: float = 0.5,
        gate_rank: int = 16,
        gate_normaliser: float = 16.0,
        conv_width: int = 0,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.value_dim = heads_of("gla", dim, head_dim, heads), head_dim
        self.key_dim = scaled_dim("gla", head_dim, expand_k)
        self.gate_normaliser, self.strategy = gate_normaliser, strategy
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.qkv = matrix(2 * keys + values, dim)
        self.conv = taps(2 * keys + values, conv_width) if conv_width else None
        self.gate_down, self.gate_up = matrix(gate_rank, dim), matrix(keys, gate_rank)
        self.gate_bias = nn.Parameter(torch.zeros(keys))
        self.gate = matrix(values, dim)
        self.norm = HeadNorm(self.value_dim)
        self.out = matrix(dim, values)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        keys, values = (self.heads, self.key_dim), (self.heads, self.value_dim)
        qkv = F.linear(x, self.qkv)
        if self.conv is not None:
            qkv = ops.causal_conv1d(qkv, self.conv, None, shard, activation="silu")
        q, k, v = split(qkv, keys, keys, values)
        raw = F.linear(F.linear(x, self.gate_down), self.gate_up, self.gate_bias)
        decay = sigmoid_decay(raw, self.gate_normaliser).unflatten(-1, keys)
        y = ops.linear_attention(q, k, v, shard, log_decay=decay, strategy=self.strategy)
        assert isinstance(y, Tensor)
        y = self.norm(y, F.linear(x, self.gate).unflatten(-1, values))
        return F.linear(y.flatten(2), self.out)
