"""Softmax attention, with or without a shard."""

from __future__ import annotations

from torch import Tensor

from xdist.dropout import Dropout
from xdist.mask import Mask
from xdist.memory.carry import whole_sequence
from xdist.ops.graph_break import graph_break
from xdist.parallel import attention as attention_parallel
from xdist.shard import SequenceShard


@graph_break
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None = None,
    *,
    mask: Mask,
    strategy: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_shard: SequenceShard | str = "same",
    dropout: Dropout | None = None,
    head_chunks: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention: softmax(softcap(scale * q k^T), mask) v.

    Args:
        q: `[B, n, H, D]`, this rank's queries; float16, bfloat16, float32 or float64.
        k: `[B, m, G, D]`, the dtype of q. H is a multiple of G: each key head serves H / G query
            heads.
        v: `[B, m, G, E]`, the dtype of q; E may differ from D.
        shard: where this rank's queries lie; None is one device.
        mask: which keys a query sees, inside its own document.
        strategy: "ulysses", "ring", "gather" or "halo" (masks of finite reach on both sides);
            "auto" takes the one that keeps its busiest rank shortest by counted FLOPs and bytes,
            "2d" included (docs/strategies/auto.md; `xdist.parallel.attention.explain` says which
            and why).
        scale: None is `D ** -0.5`.
        softcap: c > 0 turns a score s into `c * tanh(s / c)`, before the mask.
        sinks: `[H]`, one extra logit per head that takes probability and adds no value; its
            gradient is this rank's part.
        key_shard: "same" (keys lie as the queries), "replicated" (every rank holds all keys; their
            gradient is this rank's part) or the keys' own SequenceShard, whose document i the
            queries' document i sees. Causal and window masks need "same".
        dropout: which probabilities are dropped (`xdist.Dropout`); the same for every number of
            ranks, strategy and layout. None drops nothing.
        head_chunks: how many runs of heads ulysses switches and computes one after another; the
            peak of memory falls, the bytes stay. Other strategies take 1. Gradients must be needed
            on all ranks or on none: the order of the moves depends on it.
        backend: "triton", "torch" or "reference" (float64, slow); "auto" takes Triton on CUDA where
            it can serve, else torch (docs/kernels/backends.md).

    Returns:
        `[B, n, H, E]` in the dtype of q; a query that sees nothing gets 0. Scores and sums are
        float32 inside, float64 for float64.

    What moves, how many bytes and what is saved: docs/strategies/ulysses.md, ring.md, gather.md,
    halo.md and 2d.md. Shares may be uneven or empty, H and G need not divide by the ranks.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together or with the shard.
        MaskError: a window list of another length, or a mask that keys elsewhere cannot serve.
        StrategyError: an unknown strategy or backend, a forced backend that cannot serve, halo with
            a mask of unlimited reach, or head_chunks above 1 with another strategy than ulysses or
            auto.
        NumericsError: inside `xdist.checks()`, inputs that are not finite.

    Source: blockwise as Dao, "FlashAttention-2" (2023), algorithms 1 and 2; ring as Liu et al.,
    "Ring Attention with Blockwise Transformers" (2023); ulysses as Jacobs et al., "DeepSpeed
    Ulysses" (2023).
    """
    whole_sequence("attention", shard)
    return attention_parallel.attention(
        q,
        k,
        v,
        shard,
        mask=mask,
        strategy=strategy,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        key_shard=key_shard,
        dropout=dropout,
        head_chunks=head_chunks,
        backend=backend,
    )
