"""Kimi delta attention: the delta rule with a decay for each key channel.

S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,   o_t = K^-0.5 q_t^T S_t
g = -exp(A_log) softplus(x W1 W2 + dt_bias);   y = (norm(o) * sigmoid(x W3 W4)) Wo
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.decay import softplus_decay, wide
from xdist.nn.head_norm import HeadNorm, unit
from xdist.nn.heads import heads_of, split
from xdist.nn.initial import matrix, rate_log, step_bias, taps


class KDA(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H heads, K = V = head_dim.

    Kimi Team 2025, "Kimi Linear: An Expressive, Efficient Attention Architecture", equations 1 and
    9 and section 4: q, k, v = silu(conv(x W)), q and k of unit length, decay and output gate of
    rank K (gate_rank). eps: of the output norm. The same layer as Kimi Linear's
    (xdist.nn.from_transformers).

    Parameters: qkv [3 H K, C], conv [3 H K, W], beta [H, C], decay_down [R, C], decay_up [H K, R],
    A_log [H], dt_bias [H K], gate_down [R, C], gate_up [H K, R], norm.weight [K], out [C, H K].
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
        gate_rank: int | None = None,
        eps: float = 1e-5,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads_of("kda", dim, head_dim, heads), head_dim
        self.strategy = strategy
        width, rank = self.heads * head_dim, gate_rank or head_dim
        self.qkv, self.conv = matrix(3 * width, dim), taps(3 * width, conv_width)
        self.beta = matrix(self.heads, dim)
        self.decay_down, self.decay_up = matrix(rank, dim), matrix(width, rank)
        self.A_log = nn.Parameter(rate_log(self.heads))
        self.dt_bias = nn.Parameter(step_bias(width))
        self.gate_down, self.gate_up = matrix(rank, dim), matrix(width, rank)
        self.norm = HeadNorm(head_dim, gate="sigmoid", eps=eps)
        self.out = matrix(dim, width)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        shape = (self.heads, self.head_dim)
        qkv = ops.causal_conv1d(F.linear(x, self.qkv), self.conv, None, shard, activation="silu")
        q, k, v = split(qkv, shape, shape, shape)
        beta = torch.sigmoid(wide(F.linear(x, self.beta)))
        raw = F.linear(F.linear(x, self.decay_down), self.decay_up).unflatten(-1, shape)
        decay = softplus_decay(raw, self.A_log[:, None], self.dt_bias.view(shape))
        y = ops.delta_rule(
            unit(q), unit(k), v, beta, shard, log_decay=decay, strategy=self.strategy
        )
        assert isinstance(y, Tensor)
        gate = F.linear(F.linear(x, self.gate_down), self.gate_up).unflatten(-1, shape)
        return F.linear(self.norm(y, gate).flatten(2), self.out)
