"""Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xdist.memory.normalise import EPS


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, [..., C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, (x.shape[-1],), self.weight, EPS)
