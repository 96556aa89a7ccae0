"""Rotary positions, counted inside each document, so that a shard and packing change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.nn.decay import wide


def positions_of(x: Tensor, shard: Any) -> Tensor:
    """int64 [n]: the position of each token of x [B, n, ...] in its document."""
    if shard is None:
        return torch.arange(x.shape[1], device=x.device)
    return shard.document_positions.to(x.device)


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """x `[B, n, H, K]` (K even) with the pair (2i, 2i + 1) turned by position x base^(-2i/(K-2)).

    Angles are made in float64: at position 10^6 a float32 angle is off by 0.06. The frequencies
    are those of Sun et al. 2023 (RetNet), from 1 down to 1 / base.
    """
    half = x.shape[-1] // 2
    rates = base ** -torch.linspace(0, 1, half, dtype=torch.float64, device=x.device)
    angles = positions.double()[:, None] * rates
    cos, sin = (f(angles).to(wide(x).dtype)[:, None] for f in (torch.cos, torch.sin))
    even, odd = wide(x).unflatten(-1, (half, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return turned.flatten(-2).to(x.dtype)
