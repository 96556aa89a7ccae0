"""The causal convolution, with or without a shard."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from xdist.memory.carry import Carry
from xdist.ops.graph_break import graph_break
from xdist.parallel import conv as conv_parallel
from xdist.parallel.carried import carried_convolution
from xdist.shard import SequenceShard, resolve


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shard: SequenceShard | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shard: SequenceShard | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[True],
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@graph_break
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shard: SequenceShard | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution: y_t = activation(bias + sum_w weight[:, w] x_{t-W+1+w}).

    Args:
        x: `[B, n, C]`, this rank's tokens.
        weight: `[C, W]`; its gradient, like that of bias, is this rank's part.
        bias: `[C]` or None.
        shard: where this rank's tokens lie; None is one device.
        activation: None or "silu".
        initial_state: `[B, W - 1, C]`, the tokens before the first one in position order, or
            `[B, documents, W - 1, C]` where the shard has documents; equal on all ranks. Its
            gradient is this rank's part. None is zeros.
        output_final_state: also return the last W - 1 tokens (of each document), behind the end of
            the initial state where there are fewer; valid on all ranks, in the dtype of x.
        reverse: token t reads t, ..., t + W - 1 of its document, weight[:, W - 1] being its own;
            the state's tokens then lie behind the last one, and the final state is the first W - 1.
        backend: as in `linear_attention`.

    Returns:
        `[B, n, C]` in the dtype of x, or `(out, final_state)`. Each document starts afresh.

    Moves a halo: each segment receives the W - 1 tokens before it in position order, from as many
    ranks as hold them; backward sends their gradients back, in float32 or wider. A final state
    moves each document's last W - 1 tokens once to every rank. Saved for backward: x and the halo.
    Nothing needs to divide anything.

    Raises:
        ShapeError: shapes that do not fit together or with the shard, or another activation.
        StrategyError: an unknown backend, or a forced one that cannot serve.
    """
    if isinstance(shard, Carry):
        plain = initial_state is None and not output_final_state and not reverse
        return carried_convolution(
            x, weight, bias, shard, activation=activation, plain=plain, backend=backend
        )
    return conv_parallel.causal_conv1d(
        x,
        weight,
        bias,
        resolve(shard, x.shape[1]),
        activation=activation,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        backend=backend,
    )
