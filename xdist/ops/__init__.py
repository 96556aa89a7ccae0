"""The public functions, with or without a shard. Thin: each checks nothing twice and delegates."""

from xdist.ops.convolution import causal_conv1d
from xdist.ops.grid_scan import grid_scan
from xdist.ops.grids import conv_nd
from xdist.ops.linear import delta_rule, linear_attention
from xdist.ops.losses import cross_entropy, mean
from xdist.ops.moves import switch
from xdist.ops.neighborhood import (
    axial_attention,
    grid_attention,
    neighborhood_attention,
    window_attention,
)
from xdist.ops.prefix import prefix_attention
from xdist.ops.recurrences import bidirectional, recurrence
from xdist.ops.softmax import attention
from xdist.ops.state_space import selective_scan, ssd

__all__ = [
    "attention",
    "axial_attention",
    "bidirectional",
    "causal_conv1d",
    "conv_nd",
    "cross_entropy",
    "delta_rule",
    "grid_attention",
    "grid_scan",
    "linear_attention",
    "mean",
    "neighborhood_attention",
    "prefix_attention",
    "recurrence",
    "selective_scan",
    "ssd",
    "switch",
    "window_attention",
]
