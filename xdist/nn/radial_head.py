"""A head that reads the raw values of a patch beside its token: radial bases of the values.

    v' = v exp(gain(x)) + shift(x)              what the token knows of the scanner at this place
    phi[j, r] = exp(-(v'_j - c_r)^2 / (2 w^2))  every raw value j by its distance to the centres
    out = W_out silu(W_x x + W_phi phi + b) + b_out

A token of 2 x 2 x 2 voxels answers for eight voxels; its raw values say which of them is which.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist.errors import ConfigError
from xdist.nn.initial import matrix


class RadialHead(nn.Module):
    """y = head(x, raw), [..., C] and [..., V] -> [..., outputs]; each token stands alone.

    bases: centres of the radial bases, at first even over `values` (low, high), each as wide as
    their distance. hidden: width between.

    Raises:
        ConfigError: fewer than 2 bases, or values that are not in order.

    Source: radial basis functions as in Broomhead and Lowe, "Multivariable functional interpolation
    and adaptive networks" (1988), section 3; the correction of the values by the token is ours.
    """

    def __init__(
        self,
        dim: int,
        raw: int,
        outputs: int,
        *,
        hidden: int,
        bases: int = 16,
        values: tuple[float, float] = (-2.0, 4.0),
    ) -> None:
        super().__init__()
        low, high = values
        if bases < 2 or low >= high:
            raise ConfigError(
                "radial bases cannot be laid over these values",
                f"{bases} bases from {low} to {high}",
                "take 2 bases or more, and values (low, high) with low below high",
            )
        self.dim = dim
        self.width = (high - low) / (bases - 1)
        self.scale = nn.Parameter(torch.zeros(2, dim))
        self.centres = nn.Parameter(torch.linspace(low, high, bases))
        self.from_token = matrix(hidden, dim)
        self.from_raw = matrix(hidden, raw * bases)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out = matrix(outputs, hidden)
        self.out_bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, raw: Tensor) -> Tensor:
        gain, shift = F.linear(x, self.scale).split(1, -1)
        values = torch.addcmul(shift, raw, gain.exp())
        apart = (values.unsqueeze(-1) - self.centres) / self.width
        phi = apart.square().mul(-0.5).exp().flatten(-2)
        hidden = F.linear(x, self.from_token) + F.linear(phi, self.from_raw, self.bias)
        return F.linear(F.silu(hidden), self.out, self.out_bias)
