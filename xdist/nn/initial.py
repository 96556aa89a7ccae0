"""Initial values of mixers: matrices, convolution taps, decay rates and time steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def matrix(out_dim: int, in_dim: int) -> nn.Parameter:
    """[out, in], uniform in +-in^-0.5: what the published layers take (torch's Linear)."""
    bound = in_dim**-0.5
    return nn.Parameter(torch.empty(out_dim, in_dim).uniform_(-bound, bound))


def taps(channels: int, width: int) -> nn.Parameter:
    """[channels, width] of a depthwise convolution, uniform in +-width^-0.5 (torch's Conv1d)."""
    return matrix(channels, width)


def inverse_softplus(x: Tensor) -> Tensor:
    """The y of `softplus(y) = x > 0`, without overflow."""
    return x + torch.log(-torch.expm1(-x))


def step_bias(*shape: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high] (Gu and Dao 2023, section 3.6)."""
    steps = torch.empty(*shape).uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
    return inverse_softplus(steps)


def rate_log(*shape: int, low: float = 1.0, high: float = 16.0) -> Tensor:
    """log A for A uniform in [low, high] (Dao and Gu 2024, section 7)."""
    return torch.empty(*shape).uniform_(low, high).log_()
