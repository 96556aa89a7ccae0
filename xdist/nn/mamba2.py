"""Mamba-2: a state-space layer with one decay per head.

z, xBC, dt = x W;   u, B, C = silu(conv(xBC));   dt = softplus(dt + dt_bias)
h_t = exp(-exp(A_log) dt_t) h_{t-1} + dt_t B_t u_t^T;   y_t = C_t^T h_t + D u_t
out = norm(y * silu(z)) Wo
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.decay import wide
from xdist.nn.gated_norm import GateThenNorm
from xdist.nn.heads import heads_of, scaled_dim, shared_heads
from xdist.nn.initial import matrix, rate_log, step_bias, taps


class Mamba2(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H = expand x C / head_dim heads.

    Dao and Gu 2024, "Transformers are SSMs", section 7 and figure 6: B and C [groups, state_dim]
    are shared by the heads of a group; the gate comes before the norm, which is over the channels
    of a group. eps: of that norm. The same layer as Mamba-2's, Bamba's, Nemotron-H's and Granite
    4's in Transformers (xdist.nn.from_transformers).

    Parameters: proj [2 E + 2 G N + H, C] (z, u, B, C, dt), conv [E + 2 G N, W], conv_bias,
    A_log [H], dt_bias [H], D [H], norm [E], out [C, E]; E = expand x C, N = state_dim, G = groups;
    proj_bias and out_bias with bias=True.
    Moves: the halo of the convolution; the scan's state and decay, [B, H, N, head_dim] and [B, H].

    Raises:
        ConfigError: head_dim does not divide E, or groups the heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        expand: float = 2.0,
        state_dim: int = 128,
        groups: int = 1,
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        self.inner = scaled_dim("mamba2", dim, expand)
        self.state_dim, self.head_dim = state_dim, head_dim
        self.heads = heads_of("mamba2", self.inner, head_dim)
        self.groups = shared_heads("mamba2", self.heads, groups)
        self.eps, self.strategy = eps, strategy
        mixed = self.inner + 2 * groups * state_dim
        self.proj = matrix(self.inner + mixed + self.heads, dim)
        self.proj_bias = nn.Parameter(torch.zeros(self.proj.shape[0])) if bias else None
        self.conv = taps(mixed, conv_width)
        self.conv_bias = nn.Parameter(torch.zeros(mixed)) if conv_bias else None
        self.A_log = nn.Parameter(rate_log(self.heads))
        self.dt_bias = nn.Parameter(step_bias(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.Parameter(torch.ones(self.inner))
        self.out = matrix(dim, self.inner)
        self.out_bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        shared = self.groups * self.state_dim
        mixed = self.inner + 2 * shared
        z, xbc, raw = F.linear(x, self.proj, self.proj_bias).split(
            [self.inner, mixed, self.heads], -1
        )
        xbc = ops.causal_conv1d(xbc, self.conv, self.conv_bias, shard, activation="silu")
        u, b, c = xbc.split([self.inner, shared, shared], -1)
        y = ops.ssd(
            u.unflatten(-1, (self.heads, self.head_dim)),
            F.softplus(wide(raw) + wide(self.dt_bias)),
            -wide(self.A_log).exp(),
            b.unflatten(-1, (self.groups, self.state_dim)),
            c.unflatten(-1, (self.groups, self.state_dim)),
            shard,
            D=wide(self.D),
            strategy=self.strategy,
        )
        assert isinstance(y, Tensor)
        y = GateThenNorm.apply(y.flatten(2), z, self.norm, self.groups, self.eps)
        return F.linear(y, self.out, self.out_bias)
