"""The MLP of a block, `x + down(relu(up(norm(x)))^2)`: module, and explicit pass over tiles.

Squared ReLU (So et al. 2021, "Primer", section 4) costs a tenth of GELU on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xdist.memory.normalise import normalised, normalised_backward
from xdist.nn.products import Product


class SquaredReLUMLP(nn.Module):
    """[..., C] -> [..., C], hidden width `hidden`, no biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(hidden, dim))
        self.down = nn.Parameter(torch.empty(dim, hidden))
        nn.init.normal_(self.up, std=dim**-0.5)
        nn.init.zeros_(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up.t()).square() @ self.down.t()


class MLPPass:
    """One pass of `h + mlp(norm(h))` over tiles [B, T, C], with explicit backward.

    parameters: (norm [C], up [F, C], down [C, F]). Nothing is kept between tiles but the sums of
    the weights' gradients.
    """

    def __init__(self, parameters: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
        norm, up, down = parameters
        self.dtype = dtype
        self.up = Product(up, norm, dtype)
        self.down = Product(down, None, dtype)

    def forward(self, h: Tensor) -> Tensor:
        """The block's output for a tile h [B, T, C]."""
        hidden = torch.relu_(self.up.forward(normalised(h).to(self.dtype))).square_()
        return h + self.down.forward(hidden)

    def backward(self, h: Tensor, dout: Tensor) -> Tensor:
        """Gradient of h from that of the block's output; the weights' gradients are summed."""
        hn = normalised(h)
        hn_ = hn.to(self.dtype)
        hidden = torch.relu_(self.up.forward(hn_))
        dout_ = dout.to(self.dtype)
        dhidden = self.down.backward(hidden.square(), dout_).mul_(hidden).mul_(2.0)
        dhn = self.up.backward(hn_, dhidden).to(h.dtype)
        return normalised_backward(h, hn, dhn).add_(dout)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of (norm, up, down)."""
        dnorm = self.up.norm_gradient()
        return dnorm, self.up.weight_gradient(), self.down.weight_gradient()
