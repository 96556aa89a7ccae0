"""DeltaNet: each token overwrites what the state holds under its key.

S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = K^-0.5 q_t^T S_t
q, k = unit(silu(conv(x W))),  v = silu(conv(x W)),  beta = sigmoid(x Wb);   y = norm(o) Wo
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.decay import wide
from xdist.nn.head_norm import HeadNorm, unit
from xdist.nn.heads import heads_of, split
from xdist.nn.initial import matrix, taps


class DeltaNet(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H heads, K = V = head_dim.

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    section 3.3, after Schlag et al. 2021. negative_eigenvalues: beta in (0, 2) instead of (0, 1)
    (Grazzi et al. 2024, "Unlocking State-Tracking"). output_gate: the norm is gated by silu(x Wg).

    Parameters: qkv [3 H K, C], conv [3 H K, W], beta [H, C], norm.weight [K], out [C, H K];
    gate [H K, C] with an output gate.
    Moves: the halo of the convolution, and what `xdist.delta_rule` moves for [B, H, K, K].

    Raises:
        ConfigError: head_dim does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        heads: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        output_gate: bool = False,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads_of("deltanet", dim, head_dim, heads), head_dim
        self.reach = 2.0 if negative_eigenvalues else 1.0
        self.strategy = strategy
        width = self.heads * head_dim
        self.qkv, self.conv = matrix(3 * width, dim), taps(3 * width, conv_width)
        self.beta = matrix(self.heads, dim)
        self.gate = matrix(width, dim) if output_gate else None
        self.norm = HeadNorm(head_dim)
        self.out = matrix(dim, width)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        shape = (self.heads, self.head_dim)
        qkv = ops.causal_conv1d(F.linear(x, self.qkv), self.conv, None, shard, activation="silu")
        q, k, v = split(qkv, shape, shape, shape)
        beta = self.reach * torch.sigmoid(wide(F.linear(x, self.beta)))
        y = ops.delta_rule(unit(q), unit(k), v, beta, shard, strategy=self.strategy)
        assert isinstance(y, Tensor)
        gate = None if self.gate is None else F.linear(x, self.gate).unflatten(-1, shape)
        return F.linear(self.norm(y, gate).flatten(2), self.out)
