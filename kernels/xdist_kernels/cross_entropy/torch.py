"""Cross entropy of a tile of logits by operations of torch: the path of CPUs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The logits of one tile are all that exists of them, whatever the number of tokens.
TILE_TOKENS = 2048
_LOG2_E = 1.0 / math.log(2.0)


def empty_tile(tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the logits [tokens, vocab] of a tile."""
    return torch.empty(tokens, vocab, dtype=dtype, device=device)


def tile_loss(
    logits: Tensor, labels: Tensor, ignore_index: int, weight: float
) -> tuple[Tensor, Tensor]:
    """The sum of the tile's losses, 0-dim and float32 or wider, and `weight` x its gradient.

    logits [T, V] (may be overwritten), labels int64 [T], in [0, V) or ignore_index: such tokens
    add nothing. Sums are float32, float64 for float64; the gradient has the dtype of logits.
    """
    kept = labels != ignore_index
    target = torch.where(kept, labels, 0).unsqueeze(1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits, -1, dtype=wide)
    total = -(log_p.gather(1, target).squeeze(1) * kept).sum()
    gradient = log_p.mul_(_LOG2_E).exp2_()
    gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
    gradient.mul_((kept.to(gradient.dtype) * weight).unsqueeze(1))
    return total, gradient.to(logits.dtype)
