"""Cross entropy of a tile of logits, one token at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xdist_kernels.cross_entropy.torch import empty_tile

__all__ = ["TILE_TOKENS", "empty_tile", "tile_loss"]

TILE_TOKENS = 2048


def tile_loss(
    logits: Tensor, labels: Tensor, ignore_index: int, weight: float
) -> tuple[Tensor, Tensor]:
    """The sum of the tile's losses, and `weight` x its gradient in the dtype of logits.

    logits [T, V], labels int64 [T]. With x the logits of a token and y its label:
    (1) Z = sum_v exp(x_v);  (2) loss = log Z - x_y;  (3) dx_v = weight (exp(x_v) / Z - [v = y]).
    A token whose label is ignore_index adds nothing; its gradient is 0.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    gradient = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    for token, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        x = logits[token].double()
        top = x.max()
        shares = torch.exp(x - top)  # (1), relative to the largest
        z = shares.sum()
        total += math.log(float(z)) + (top - x[label])  # (2)
        gradient[token] = weight * shares / z  # (3)
        gradient[token, label] -= weight
    return total, gradient.to(logits.dtype)
