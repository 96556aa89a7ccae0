"""Matrix products of streamed layers: weights folded and cast once per pass, gradients summed.

A `Product` is `y = x W^T` for one pass over the tiles. The norm weight before it is folded into
W (`W * norm`, one pass over W instead of one over every token) and W is cast once to the dtype of
the products. Weight gradients of the tiles are summed in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Product:
    """weight [O, I], norm [I] or None (the weight of the norm before it)."""

    def __init__(self, weight: Tensor, norm: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight
        self.norm = norm
        folded = weight if norm is None else weight * norm
        self.folded = folded.to(dtype)
        self.gradient: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] in the products' dtype -> [..., O] in the same dtype."""
        return x @ self.folded.t()

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """Gradient of x, and that of the weight added to the sum; x, dy in the products' dtype."""
        self.accumulate(x, dy)
        return dy @ self.folded

    def accumulate(self, x: Tensor, dy: Tensor) -> None:
        """Adds this tile's part to the weight's gradient."""
        part = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.weight)
        self.gradient.add_(part)

    def weight_gradient(self) -> Tensor:
        """The gradient of the weight, [O, I]."""
        folded = self._folded_gradient()
        return folded if self.norm is None else folded * self.norm

    def norm_gradient(self) -> Tensor:
        """The gradient of the norm folded into the weight, [I]."""
        return (self._folded_gradient() * self.weight).sum(0)

    def _folded_gradient(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.gradient is None else self.gradient
