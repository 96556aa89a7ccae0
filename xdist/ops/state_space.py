"""State-space models, with or without a shard."""

from __future__ import annotations

from torch import Tensor

from xdist.ops.graph_break import graph_break
from xdist.parallel import recurrent
from xdist.parallel import selective_scan as selective_scan_parallel
from xdist.parallel import ssd as ssd_parallel
from xdist.shard import SequenceShard, resolve


@graph_break
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    shard: SequenceShard | None = None,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """State-space duality, the recurrence of Mamba-2: one decay a token and head.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t^T h_t + D x_t.

    Args:
        x: `[B, n, H, D]`, this rank's tokens; float64, float32 or bfloat16.
        dt: `[B, n, H]`, above 0, any float dtype: dt x A is float32 or wider.
        A: `[H]`, below 0. Its gradient, like those of D and initial_state, is this rank's part.
        B: `[B, n, G, N]`, the dtype of x. H is a multiple of G: each group serves H / G heads.
        C: `[B, n, G, N]`, the dtype of x.
        shard: where this rank's tokens lie; None is one device.
        D: `[H]` or None, the skip.
        initial_state: `[B, H, N, D]`, or `[B, documents, H, N, D]` where the shard has documents;
            equal on all ranks.
        output_final_state: also return the state after the last token (of each document), valid
            on all ranks, float32 (float64 with float64 inputs).
        strategy, algorithm, reverse, backend: as in `linear_attention`. Under "switch" a group goes
            once to every rank whose heads it serves.

    Returns:
        y `[B, n, H, D]` in the dtype of x, or `(y, final_state)`. Each document starts afresh.

    What moves, how many bytes and what is saved: docs/strategies/scan.md and switch.md: this is
    linear attention with q = C, k = B, v = dt x, log_decay = dt A and scale 1. Nothing needs to
    divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy, algorithm or backend, or a forced backend that cannot
            serve.
        NumericsError: inside `xdist.checks()`, inputs that are not finite, dt not above 0 or A
            above 0.

    Source: Dao and Gu, "Transformers are SSMs" (2024), section 6.
    """
    shard = resolve(shard, x.shape[1])
    request = ssd_parallel.request(
        x,
        dt,
        A,
        B,
        C,
        shard,
        D=D,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        backend=backend,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)


@graph_break
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    shard: SequenceShard | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba-1: a decay of its own for every channel and state.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (<C_t, h_t> + D u_t) * silu(z_t).

    Args:
        u: `[B, n, C]`, this rank's tokens; float64, float32 or bfloat16.
        delta: `[B, n, C]`, at least 0 after bias and softplus; float64 where u is.
        A: `[C, N]`, at most 0. Its gradient, like those of D, delta_bias and initial_state, is
            this rank's part.
        B: `[B, n, N]`.
        C: `[B, n, N]`.
        shard: where this rank's tokens lie; None is one device.
        D: `[C]` or None.
        z: `[B, n, C]` or None, the gate.
        delta_bias: `[C]` or None, added to delta, in float32 or wider.
        delta_softplus: delta is softplus(delta + bias), in float32 or wider.
        initial_state: `[B, C, N]`, or `[B, documents, C, N]` where the shard has documents; equal
            on all ranks.
        output_final_state: also return the state after the last token (of each document), valid
            on all ranks, float32 (float64 with float64 inputs).
        strategy, algorithm, reverse, backend: as in `linear_attention`. Under "switch" channels are
            split as `torch.tensor_split`; B and C go once to every rank that has channels.

    Returns:
        y `[B, n, C]` in the dtype of u, or `(y, final_state)`. Each document starts afresh.

    What moves, how many bytes and what is saved: docs/recurrences/selective_scan.md. Nothing needs
    to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy, algorithm or backend, or a forced backend that cannot
            serve.
        NumericsError: inside `xdist.checks()`, inputs that are not finite, delta below 0 or A above
            0.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023),
    algorithm 2.
    """
    shard = resolve(shard, u.shape[1])
    request = selective_scan_parallel.request(
        u,
        delta,
        A,
        B,
        C,
        shard,
        local=selective_scan_parallel.Local(D, z, delta_bias, delta_softplus),
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        backend=backend,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)
