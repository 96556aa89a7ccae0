"""Prefix attention: softmax attention with one learned query per head.

o_t = sum_{i<=t} softmax_i(D^-0.5 q . k_i) v_i,   k, v = x W;   y = o Wo
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.heads import heads_of, split
from xdist.nn.initial import matrix


class PrefixAttention(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H heads of head_dim.

    Feng et al. 2024, "Attention as an RNN", section 3.2 (Aaren): the query is a parameter of the
    layer, so that the softmax over all earlier tokens is a scan.

    Parameters: query [H, head_dim], kv [2 H head_dim, C], out [C, H head_dim].
    Moves: the scan's running maximum, sum and weighted values, (head_dim + 2) numbers a head.

    Raises:
        ConfigError: head_dim does not divide dim.
    """

    def __init__(self, dim: int, *, head_dim: int = 32, heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim = heads_of("prefix", dim, head_dim, heads), head_dim
        width = self.heads * head_dim
        self.query = nn.Parameter(torch.randn(self.heads, head_dim))
        self.kv, self.out = matrix(2 * width, dim), matrix(dim, width)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        shape = (self.heads, self.head_dim)
        k, v = split(F.linear(x, self.kv), shape, shape)
        y = ops.prefix_attention(self.query, k, v, shard)
        return F.linear(y.flatten(2), self.out)
