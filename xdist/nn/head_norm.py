"""Norms over one head: L2 for queries and keys, RMS with an output gate for values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xdist.errors import ConfigError
from xdist.nn.gated_norm import GATES, NormThenGate, Unit


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dim, [B, n, H, K], in float32 or wider inside."""
    made: Tensor = Unit.apply(x, eps)
    return made


class HeadNorm(nn.Module):
    """`norm(y) * weight * gate(z)` over the last dim, [B, n, H, V]; RMS norm of each head.

    gate: "silu" or "sigmoid", applied where z is given; weight [V], or none where not affine.
    """

    def __init__(
        self, dim: int, *, gate: str = "silu", eps: float = 1e-6, affine: bool = True
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ConfigError(f"there is no gate {gate!r}", f"gates are {', '.join(GATES)}")
        self.gate, self.eps = gate, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        made: Tensor = NormThenGate.apply(y, z, self.weight, self.gate, self.eps)
        return made
