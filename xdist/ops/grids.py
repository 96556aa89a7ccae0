"""Convolution of a grid, with or without a shard."""

from __future__ import annotations

from torch import Tensor

from xdist.cost.conv_nd import Padding
from xdist.cost.per_dim import PerDim
from xdist.grid_shard import GridShard
from xdist.ops.graph_break import graph_break
from xdist.parallel import conv_nd as conv_nd_parallel


@graph_break
def conv_nd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gshard: GridShard | None = None,
    *,
    stride: PerDim = 1,
    padding: Padding = "same",
    dilation: PerDim = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolution of a grid: y_o = bias + sum_t weight_t x_{stride o + dilation t - front}.

    As torch's `conv1d` to `conv3d`, channels last, and with a fourth dim.

    Args:
        x: `[B, S1, ..., Sk, C]`, this rank's part; k from 1 to 4.
        weight: `[Cout, C / groups, K1, ..., Kk]`; its gradient, like that of bias, is this rank's
            part: the sum over the ranks is that of one device.
        bias: `[Cout]` or None.
        gshard: which part of the grid x is; None is one device.
        stride: an integer, or one for each dim; likewise dilation.
        padding: "same" gives ceil(S / stride) outputs a dim, with max((outputs - 1) stride +
            dilation (K - 1) + 1 - S, 0) zeros, an odd one behind; "valid" none; an integer, or one
            for each dim, that many zeros on either side.
        groups: groups of channels; C is a depthwise convolution.
        backend: "auto", "torch" or "reference" (float64, slow); there is no Triton kernel.

    Returns:
        `[B, O1, ..., Ok, Cout]` in the dtype of x, this rank's part of the grid
        `xdist.conv_sizes(sizes, kernel, ...)`, which is sharded along the same dim:
        `gshard.resized(...)` of those sizes.

    Moves what this rank's outputs read of other ranks' shares, once, in the dtype of x: with stride
    1 and "same" dilation (K - 1) positions of the sharded dim in all, however long it is. Backward
    their gradients return in float32 or wider. Outputs that read nothing of others are computed
    meanwhile. Saved for backward: x and what was received. Nothing needs to divide anything.
    Formula: `xdist.cost.conv_nd.conv_nd_bytes`.

    Raises:
        ShapeError: shapes that do not fit together or with the shard, settings that are none, or a
            dim that is too small for one output.
        StrategyError: an unknown backend, or a forced one that cannot serve.
    """
    return conv_nd_parallel.conv_nd(
        x,
        weight,
        bias,
        gshard,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        backend=backend,
    )
