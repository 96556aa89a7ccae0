"""Mamba: a selective state-space layer with a decay for each channel and state.

u, z = x W;   u = silu(conv(u));   dt, B, C = u Wx;   dt = softplus(dt Wdt + dt_bias)
h_t = exp(-exp(A_log) dt_t) h_{t-1} + dt_t B_t u_t;   out = ((C_t . h_t + D u_t) * silu(z)) Wo
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.nn.decay import wide
from xdist.nn.heads import scaled_dim
from xdist.nn.initial import matrix, step_bias, taps


class Mamba(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; E = expand x C channels of N = state_dim states.

    Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm
    2 and section 3.6: A starts as 1..N for each channel, steps log-uniform in [0.001, 0.1], rank
    step_rank of the step, by default C / 16 rounded up. The same layer as Transformers'
    MambaMixer (xdist.nn.from_transformers).

    Parameters: proj [2E, C] (u, z), conv [E, W], conv_bias [E], select [rank + 2N, E],
    step [E, rank], dt_bias [E], A_log [E, N], D [E], out [C, E]; proj_bias and out_bias with
    bias=True.
    Moves: the halo of the convolution; the scan's state [B, E, N] and the sums of steps [B, E].
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        step_rank: int | None = None,
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        inner = scaled_dim("mamba", dim, expand)
        rank = math.ceil(dim / 16) if step_rank is None else step_rank
        self.strategy = strategy
        self.sizes = (rank, state_dim, state_dim)
        self.proj = matrix(2 * inner, dim)
        self.proj_bias = nn.Parameter(torch.zeros(2 * inner)) if bias else None
        self.conv = taps(inner, conv_width)
        self.conv_bias = nn.Parameter(torch.zeros(inner)) if conv_bias else None
        self.select = matrix(sum(self.sizes), inner)
        self.step, self.dt_bias = matrix(inner, rank), nn.Parameter(step_bias(inner))
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out = matrix(dim, inner)
        self.out_bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        u, z = F.linear(x, self.proj, self.proj_bias).chunk(2, -1)
        u = ops.causal_conv1d(u, self.conv, self.conv_bias, shard, activation="silu")
        raw, b, c = F.linear(u, self.select).split(self.sizes, -1)
        y = ops.selective_scan(
            u, F.linear(raw, self.step), -wide(self.A_log).exp(), b, c, shard,
            D=wide(self.D), z=z, delta_bias=wide(self.dt_bias), delta_softplus=True,
            strategy=self.strategy,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return F.linear(y, self.out, self.out_bias)
