"""Data-dependent decays in log space; always float32 or wider, whatever the layer's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def softplus_decay(a: Tensor, rate_log: Tensor, bias: Tensor) -> Tensor:
    """log_decay = -exp(rate_log) softplus(a + bias): Mamba-2's decay, at most 0.

    a `[B, n, H]` or `[B, n, H, K]`; rate_log and bias broadcast to it.
    """
    return -wide(rate_log).exp() * F.softplus(wide(a) + wide(bias))


def sigmoid_decay(a: Tensor, normaliser: float = 1.0) -> Tensor:
    """log of sigmoid(a)^(1 / normaliser), at most 0."""
    return F.logsigmoid(wide(a)) / normaliser
