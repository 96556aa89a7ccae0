"""Retention: linear attention with a fixed decay per head and rotary positions.

S_t = gamma_h S_{t-1} + k_t v_t^T,   gamma_h = 1 - 2^(-5-h),   o_t = K^-0.5 q_t^T S_t
y = (norm(o) * silu(x Wg)) Wo
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.errors import ConfigError
from xdist.nn.decay import wide
from xdist.nn.head_norm import HeadNorm
from xdist.nn.heads import heads_of, scaled_dim, split
from xdist.nn.initial import matrix
from xdist.nn.rotary import positions_of, rotate


class Retention(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H heads, K = head_dim, V = expand_v x head_dim.

    Sun et al. 2023, "Retentive Network", equations 5 and 8: decays are fixed (no parameter), the
    norm is over each head without a weight, the gate is swish. Positions of the rotation count
    inside each document. rotary=False leaves the rotation out.

    Parameters: qkv [H (2K + V), C], gate [H V, C], out [C, H V].
    Moves: the scan's state, [B, H, K, V]; its transition is known to all.

    Raises:
        ConfigError: head_dim does not divide dim, or is odd with rotary positions.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        heads: int | None = None,
        expand_v: float = 2.0,
        rotary: bool = True,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        if rotary and head_dim % 2:
            raise ConfigError("mixer 'retention': rotary pairs", f"head_dim {head_dim} is odd")
        self.heads, self.key_dim = heads_of("retention", dim, head_dim, heads), head_dim
        self.value_dim = scaled_dim("retention", head_dim, expand_v)
        self.rotary, self.strategy = rotary, strategy
        self.qkv = matrix(self.heads * (2 * self.key_dim + self.value_dim), dim)
        self.gate = matrix(self.heads * self.value_dim, dim)
        self.norm = HeadNorm(self.value_dim, affine=False)
        self.out = matrix(dim, self.heads * self.value_dim)

    def log_decay(self, like: Tensor) -> Tensor:
        """log gamma [H]."""
        powers = torch.arange(5, 5 + self.heads, dtype=torch.float64, device=like.device)
        return torch.log1p(-torch.exp(-math.log(2.0) * powers)).to(wide(like).dtype)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        keys, values = (self.heads, self.key_dim), (self.heads, self.value_dim)
        q, k, v = split(F.linear(x, self.qkv), keys, keys, values)
        if self.rotary:
            positions = positions_of(x, shard)
            q, k = rotate(q, positions), rotate(k, positions)
        decay = self.log_decay(x)
        y = ops.linear_attention(q, k, v, shard, log_decay=decay, strategy=self.strategy)
        assert isinstance(y, Tensor)
        y = self.norm(y, F.linear(x, self.gate).unflatten(-1, values))
        return F.linear(y.flatten(2), self.out)
