"""Gated linear attention with scalar data-dependent decay and a short causal convolution.

    q, k, v = silu(conv(x Wqkv^T));   g = logsigmoid(x Wd^T + b)       [one decay per head]
    y = norm(linear_attention(q, k, v, g)) * silu(x Wg^T);   out = y Wo^T

After Yang et al. 2023 (GLA, section 4.4) with Mamba-2's scalar decay (Dao and Gu 2024, section 7).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.heads import heads_of
from xdist.nn.norm import RMSNorm


class GatedLinearAttention(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; C / head_dim heads, K = V = head_dim.

    Moves: the halo of the convolution (conv_width - 1 tokens x 3C) and the scan of the state
    ([B, H, K, V] and [B, H] per segment).
    """

    def __init__(self, dim: int, *, head_dim: int = 32, conv_width: int = 4) -> None:
        super().__init__()
        heads = heads_of("gated_linear", dim, head_dim)
        self.heads = heads
        self.qkv = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)
        self.conv = nn.Parameter(torch.randn(3 * dim, conv_width) * conv_width**-0.5)
        self.decay = nn.Parameter(torch.randn(heads, dim) * dim**-0.5)
        # Half lives of the heads from about 5 to 350 tokens at the start.
        spread = torch.linspace(2.0, 6.2, heads) if heads > 1 else torch.tensor([4.0])
        self.decay_bias = nn.Parameter(spread)
        self.gate = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.out_norm = RMSNorm(dim)
        self.out = nn.Parameter(torch.randn(dim, dim) * dim**-0.5 / math.sqrt(2.0))

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        projected = x @ self.qkv.t()
        z = ops.causal_conv1d(projected, self.conv, None, shard, activation="silu")
        q, k, v = z.unflatten(-1, (3, self.heads, -1)).unbind(2)
        log_decay = F.logsigmoid(x @ self.decay.t() + self.decay_bias)
        y = ops.linear_attention(q, k, v, shard, log_decay=log_decay)
        assert isinstance(y, Tensor)
        y = y.flatten(2)
        return (self.out_norm(y) * F.silu(x @ self.gate.t())) @ self.out.t()
