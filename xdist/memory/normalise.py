"""Root-mean-square normalisation without a weight, and its gradient, for tiles."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def normalised(x: Tensor) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last dim (a weight is folded into what follows)."""
    return torch.rms_norm(x, (x.shape[-1],), None, EPS)


def normalised_backward(x: Tensor, xn: Tensor, dxn: Tensor) -> Tensor:
    """Gradient of x from `xn = normalised(x)` and its gradient; all [..., C]."""
    scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(EPS).rsqrt_().unsqueeze(-1)
    slope = torch.linalg.vecdot(dxn, xn).div_(-x.shape[-1]).unsqueeze(-1)
    return torch.addcmul(dxn, xn, slope).mul_(scale)
