"""Positions in a grid and times of a diffusion as sines and cosines (Vaswani et al. 2017, 3.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist.grid_shard import GridShard

_PERIOD = 10_000.0
_FREQUENCIES = 32


def waves(values: Tensor, count: int) -> Tensor:
    """float64 `[..., 2 count]`: sines, then cosines, of `count` frequencies from 1 downwards."""
    powers = torch.arange(count, dtype=torch.float64, device=values.device) / count
    angles = values.to(torch.float64)[..., None] * _PERIOD**-powers
    return torch.cat([angles.sin(), angles.cos()], -1)


def position_waves(gshard: GridShard, dim: int, like: Tensor) -> Tensor:
    """`[1, s1..sk, dim]` of this rank's part: each grid dim's positions, in channels of its own.

    A dim gets 2 * (dim // 2k) channels; what is left over is 0. In the dtype of `like`.
    """
    dims = len(gshard.sizes)
    each = dim // (2 * dims)
    found = like.new_zeros(1, *gshard.local_sizes, dim)
    for d in range(dims):
        shape = [1] * (dims + 1)
        shape[d + 1] = -1
        own = waves(gshard.positions(d), each).to(like).view(*shape, 2 * each)
        found[..., 2 * each * d : 2 * each * (d + 1)] = own
    return found


class Modulation(nn.Module):
    """Times `[B]` in [0, 1] -> `[B, count, dim]`, what a layer shifts, scales and gates by.

    Sines and cosines, a map to `dim`, SiLU and a map to all parts (Peebles and Xie 2023, "DiT",
    section 3.2), whose biases start at `start`, one number a part. Each layer has its own, so that
    it can be computed again alone.
    """

    def __init__(self, dim: int, start: Sequence[float]) -> None:
        super().__init__()
        self.count = len(start)
        self.first = nn.Parameter(torch.randn(dim, 2 * _FREQUENCIES) * _FREQUENCIES**-0.5)
        self.second = nn.Parameter(0.02 * torch.randn(self.count * dim, dim))
        self.bias = nn.Parameter(torch.tensor(start).repeat_interleave(dim))

    def forward(self, times: Tensor) -> Tensor:
        found = waves(1000.0 * times, _FREQUENCIES).to(self.first.dtype)
        parts = F.linear(F.silu(found @ self.first.t()), self.second, self.bias)
        return parts.unflatten(-1, (self.count, -1))
