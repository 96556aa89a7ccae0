"""Softmax with a fixed query over every prefix, with or without a shard."""

from __future__ import annotations

from torch import Tensor

from xdist.ops.graph_break import graph_break
from xdist.parallel import prefix_attention as prefix_attention_parallel
from xdist.parallel import recurrent
from xdist.shard import SequenceShard, resolve


@graph_break
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None = None,
    *,
    scale: float | None = None,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of one fixed query per head over every prefix.

    o_t = softmax_{i<=t}(scale * q . k_i) v_i.

    Args:
        q: `[H, D]`, held whole by every rank; its gradient is this rank's part.
        k: `[B, n, H, D]`, this rank's tokens; float64, float32 or bfloat16.
        v: `[B, n, H, V]`.
        shard: where this rank's tokens lie; None is one device.
        scale: None is `D ** -0.5`.
        strategy, algorithm, reverse: as in `linear_attention`; in reverse o_t reads i >= t.
        backend: "auto", "torch" or "reference" (float64, slow); there is no Triton kernel.

    Returns:
        `[B, n, H, V]` in the dtype of v. Each document starts afresh. Scores and sums are float32
        inside, float64 with float64 inputs; no score is too large.

    What moves, how many bytes and what is saved: docs/recurrences/prefix_attention.md. Nothing
    needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy, algorithm or backend, or a forced backend that cannot
            serve.
        NumericsError: inside `xdist.checks()`, inputs that are not finite.

    Source: Feng et al., "Attention as an RNN" (2024), section 3.
    """
    shard = resolve(shard, v.shape[1])
    request = prefix_attention_parallel.request(
        q, k, v, shard, scale=scale, reverse=reverse, backend=backend
    )
    out = recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)
    assert isinstance(out, Tensor)
    return out
