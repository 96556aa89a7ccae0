"""Lightning attention: a fixed decay per head that grows weaker with depth.

q, k, v = silu(x W);   S_t = exp(-s_h) S_{t-1} + k_t v_t^T;   y = (sigmoid(x Wg) * norm(o)) Wo
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.errors import ConfigError
from xdist.nn.decay import wide
from xdist.nn.head_norm import HeadNorm
from xdist.nn.heads import heads_of
from xdist.nn.initial import matrix


class LightningAttention(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H heads, K = V = head_dim.

    MiniMax, "MiniMax-01" 2025, section 2.2.1, after Qin et al. 2024, "Lightning Attention-2".
    The slope of head h (from 1) in layer l of L is 2^(-8h/H) (1 - l / (L - 1 + 1e-5) + 1e-5);
    the norm is over all heads together.

    Parameters: qkv [3 H K, C] (q, k, v of a head in a row), norm.weight [H K], gate [H K, C],
    out [C, H K].
    Moves: the scan's state, [B, H, K, K]; its transition is known to all.

    Raises:
        ConfigError: head_dim does not divide dim, or layer is not one of layers.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        heads: int | None = None,
        layer: int = 0,
        layers: int = 1,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= layer < layers:
            raise ConfigError("mixer 'lightning': no such layer", f"{layer} of {layers}, from 0")
        self.heads, self.head_dim = heads_of("lightning", dim, head_dim, heads), head_dim
        self.depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        self.strategy = strategy
        width = self.heads * head_dim
        self.qkv = matrix(3 * width, dim)
        self.norm = HeadNorm(width, gate="sigmoid")
        self.gate = matrix(width, dim)
        self.out = matrix(dim, width)

    def log_decay(self, like: Tensor) -> Tensor:
        """The negative slopes [H]."""
        heads = torch.arange(1, self.heads + 1, dtype=torch.float64, device=like.device)
        return (-self.depth * 2.0 ** (-8.0 * heads / self.heads)).to(wide(like).dtype)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        qkv = F.silu(F.linear(x, self.qkv)).unflatten(-1, (self.heads, 3, self.head_dim))
        q, k, v = qkv.unbind(3)
        decay = self.log_decay(x)
        y = ops.linear_attention(q, k, v, shard, log_decay=decay, scale=1.0, strategy=self.strategy)
        assert isinstance(y, Tensor)
        return F.linear(self.norm(y.flatten(2), F.linear(x, self.gate)), self.out)
