"""Global means: cross entropy and the mean, with or without a shard."""

from __future__ import annotations

from torch import Tensor

from xdist.memory import loss as loss_memory
from xdist.memory import mean as mean_memory
from xdist.ops.graph_break import graph_break
from xdist.shard import SequenceShard


@graph_break
def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    shard: SequenceShard | None = None,
    *,
    ignore_index: int = -100,
    valid_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean cross entropy of `hidden @ head_weight^T` over all valid tokens, tiled over tokens.

    Args:
        hidden: `[B, n, C]`, this rank's tokens, any float dtype.
        head_weight: `[vocab, C]`, the dtype of hidden; its gradient is this rank's part.
        labels: `[B, n]` int64, already shifted by global position; in [0, vocab) or ignore_index.
        shard: where the tokens lie; None is one device.
        ignore_index: labels of this value count nothing.
        valid_tokens: valid labels of the whole global batch (gradient accumulation: of all its
            calls); None counts this call's over data x sequence.
        backend: of the loss of a tile: auto, triton, torch or reference (docs/kernels/
            cross_entropy.md).

    Returns:
        The global mean, 0-dim, the same on every rank; float32, float64 for float64. Its backward
        is that of this rank's own terms, so that each token counts once in the sum over ranks.
        Without any valid token the loss and its gradients are 0.

    Moves one or two numbers (reduce); backward moves nothing. The logits of one tile exist at a
    time; gradients are made in the same sweep, so that hidden is kept for backward as its own
    gradient, `[B, n, C]`. Backward runs once. Nothing needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown backend, or Triton is forced and cannot serve.

    Source: fused head and loss as Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models" (2024), section 3, over tiles of tokens rather than of the vocabulary.
    """
    return loss_memory.cross_entropy(
        hidden,
        head_weight,
        labels,
        shard,
        ignore_index=ignore_index,
        valid_tokens=valid_tokens,
        backend=backend,
    )


@graph_break
def mean(x: Tensor, shard: SequenceShard | None = None, *, weight: Tensor | None = None) -> Tensor:
    """Global mean of x over data x sequence ranks: `sum(weight * x) / sum(weight)`.

    Args:
        x: any shape, this rank's values (per-token losses, squared errors, residuals).
        shard: where they lie; None is one device.
        weight: broadcasts to x, constant (it gets no gradient); None is 1. Values of weight 0 are
            left out, whatever they are.

    Returns:
        The mean, 0-dim, the same on every rank; float32, float64 for float64; 0 where all weights
        are 0. Its backward is that of this rank's own terms. Sums run in float64.

    Moves two numbers (reduce); backward moves nothing.

    Raises:
        ShapeError: a weight that does not broadcast to x.
    """
    return mean_memory.mean(x, shard, weight=weight)
