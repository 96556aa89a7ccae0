"""Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4), and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, [..., C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, (x.shape[-1],), self.weight, EPS)


def normalised(x: Tensor) -> Tensor:
    """RMSNorm without a weight (streamed layers fold it into the projection that follows)."""
    return torch.rms_norm(x, (x.shape[-1],), None, EPS)


def normalised_backward(x: Tensor, xn: Tensor, dxn: Tensor) -> Tensor:
    """Gradient of x from `xn = normalised(x)` and its gradient; all [..., C]."""
    scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(EPS).rsqrt_().unsqueeze(-1)
    slope = torch.linalg.vecdot(dxn, xn).div_(-x.shape[-1]).unsqueeze(-1)
    return torch.addcmul(dxn, xn, slope).mul_(scale)
