"""Norms over one head: L2 for queries and keys, RMS with an output gate for values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist.errors import ConfigError
from xdist.nn.decay import wide

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dim, [..., K], in float32 or wider inside."""
    width = x.shape[-1]
    # The same as the RMS norm but for a factor; one fused pass instead of four over x.
    return torch.rms_norm(wide(x), (width,), None, eps / width).mul(width**-0.5).to(x.dtype)


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
        weight = None if self.weight is None else wide(self.weight)
        normed = torch.rms_norm(wide(y), (y.shape[-1],), weight, self.eps)
        if z is not None:
            normed = normed * GATES[self.gate](wide(z))
        return normed.to(y.dtype)
