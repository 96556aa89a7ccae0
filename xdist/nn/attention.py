"""Softmax attention of one layer, by default causal over a sliding window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from xdist import ops
from xdist.mask import Mask
from xdist.nn.heads import heads_of


class Attention(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; C / head_dim heads.

    window: keys to the left that a query sees besides its own (None: all of its document).
    strategy: as in `xdist.attention`; what moves is written there.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        window: int | None = None,
        causal: bool = True,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        self.heads = heads_of("attention", dim, head_dim)
        self.window = window
        self.causal = causal
        self.strategy = strategy
        self.q = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.kv = nn.Parameter(torch.randn(2 * dim, dim) * dim**-0.5)
        self.out = nn.Parameter(torch.randn(dim, dim) * dim**-0.5 / math.sqrt(2.0))

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        q = (x @ self.q.t()).unflatten(-1, (self.heads, -1))
        k, v = (x @ self.kv.t()).unflatten(-1, (2, self.heads, -1)).unbind(2)
        mask = Mask(causal=self.causal, window=self.window)
        y = ops.attention(q, k, v, shard, mask=mask, strategy=self.strategy)
        return y.flatten(2) @ self.out.t()
