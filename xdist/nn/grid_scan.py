"""Layers that scan a grid: one order a layer, several orders summed, some on a coarse copy.

    u, z = x W;   u = silu(conv(u))
    y = sum over orders of both directions of the recurrence over u in that order
    out = (norm(y) * silu(z)) Wo

An order names dims from outermost to innermost; dims it leaves out are rows that start afresh.
Sources: Li et al., "Mamba-ND" (2024), section 3.2: one order a layer, turning from layer to layer.
Liu et al., "VMamba" (2024), section 4.2: a cross-scan and its merge by a sum. Shi et al.,
"Multi-Scale VMamba" (2024), section 3.3: directions on a strided copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.cost.grid_scan import scan_home
from xdist.errors import ConfigError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.memory.checkpoint import checkpoint
from xdist.nn.grid_cores import build_core
from xdist.nn.heads import scaled_dim
from xdist.nn.initial import matrix
from xdist.nn.norm import RMSNorm
from xdist.parallel.grid_scales import spread

Order = tuple[int, ...]


def cross_orders(dims: int) -> tuple[Order, ...]:
    """The orders of a cross-scan, each dim once the outermost: in both directions four of a plane,
    six of a volume."""
    return tuple(tuple((first + d) % dims for d in range(dims)) for first in range(dims))


def turning_order(dims: int, layer: int) -> Order:
    """The order of Mamba-ND's layer `layer`: each dim in turn the innermost, the last one first."""
    return cross_orders(dims)[-layer % dims]


class Directions(nn.Module):
    """y = directions(u, gshard): one order in both directions, `[B, S1..Sk, E]` -> the same.

    coarse: taps [E, 1, W, ...] of the depthwise convolution whose strided outputs are scanned
    instead of u, or None; each token then takes its coarse cell's output.
    """

    def __init__(
        self,
        dim: int,
        order: Order,
        recurrence: str,
        *,
        coarse: nn.Parameter | None = None,
        stride: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.order, self.coarse, self.stride = order, coarse, stride
        self.ahead = build_core(recurrence, dim, **options)
        self.behind = build_core(recurrence, dim, **options)

    def forward(self, u: Tensor, gshard: GridShard) -> Tensor:
        grid = gshard
        if self.coarse is not None:
            u = ops.conv_nd(u, self.coarse, None, gshard, stride=self.stride, groups=u.shape[-1])
            grid = gshard.resized([-(-size // self.stride) for size in gshard.sizes])
        u, home = grid.switch(u, scan_home(grid.sizes, grid.dim, grid.size, self.order))
        sides = (self.ahead.arguments(u), self.behind.arguments(u))
        first, second = ops.grid_scan(self.ahead.op, sides, home, order=self.order, reverse="both")
        y, _ = home.switch((first + second).flatten(len(grid.sizes) + 1), grid.dim)
        return y if self.coarse is None else spread(y, grid, gshard, self.stride)


class GridScan(nn.Module):
    """y = layer(x, gshard), `[B, S1..Sk, C]` -> the same; E = expand x C channels are scanned.

    Args:
        dim: C.
        orders: of which each is scanned in both directions, with parameters of their own, and
            summed: `[turning_order(k, layer)]` is Mamba-ND's layer, `cross_orders(k)` VMamba's.
        dims: k, where no order names them all.
        recurrence: of `xdist.nn.grid_cores.CORES`: "selective_scan", "ssd", "linear_attention" or
            "delta_rule"; options are those of its core.
        strides: for each order 1, or how many times coarser the copy is that it scans.
        conv: odd taps along each dim of the depthwise convolution in front; 0 is none.
        recompute: keep each order's input and what its exchanges received, and compute the rest
            again in backward, without sending again.

    Parameters: proj [2E, C], conv [E, 1, W, ...], conv_bias [E], norm.weight [E], out [C, E], two
    cores an order, and coarse [E, 1, W, ...] of each order on a coarse copy.
    Moves: the convolutions' halos; where the sharded dim lies inside an order, u and y once each by
    a switch; where it is the outermost dim, states, both directions in one exchange; and the coarse
    positions at the borders of shares.

    Raises:
        ConfigError: no orders, not one stride an order, an even convolution, or a core's own.
    """

    def __init__(
        self,
        dim: int,
        orders: Sequence[Order],
        *,
        dims: int | None = None,
        recurrence: str = "selective_scan",
        expand: float = 1.0,
        strides: Sequence[int] | None = None,
        conv: int = 3,
        recompute: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        strides = (1,) * len(orders) if strides is None else tuple(strides)
        self.dims = max((max(order) + 1 for order in orders), default=0) if dims is None else dims
        _check(orders, strides, conv, self.dims)
        inner = scaled_dim("grid_scan", dim, expand)
        self.recompute = recompute
        self.proj, self.out = matrix(2 * inner, dim), matrix(dim, inner)
        self.conv = _taps(inner, conv, self.dims) if conv else None
        self.conv_bias = nn.Parameter(torch.zeros(inner)) if conv else None
        self.norm = RMSNorm(inner)
        self.orders = nn.ModuleList(
            Directions(
                inner, tuple(order), recurrence, stride=stride,
                coarse=_taps(inner, conv or 3, self.dims) if stride > 1 else None, **options,
            )
            for order, stride in zip(orders, strides, strict=True)
        )  # fmt: skip

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        gshard = resolve_grid(gshard, x, self.dims)
        u, z = F.linear(x, self.proj).chunk(2, -1)
        if self.conv is not None:
            u = ops.conv_nd(u, self.conv, self.conv_bias, gshard, groups=u.shape[-1])
        u = F.silu(u)
        y: Tensor | None = None
        for directions in self.orders:
            if self.recompute and torch.is_grad_enabled():
                part = checkpoint(directions, u, gshard)
            else:
                part = directions(u, gshard)
            y = part if y is None else y + part
        assert y is not None
        return F.linear(self.norm(y.to(u.dtype)) * F.silu(z), self.out)


def _taps(channels: int, width: int, dims: int) -> nn.Parameter:
    """[channels, 1, width, ...], uniform in +-(width^dims)^-0.5."""
    flat = matrix(channels, width**dims)
    return nn.Parameter(flat.detach().view(channels, 1, *(width,) * dims))


def _check(orders: Sequence[Order], strides: Sequence[int], conv: int, dims: int) -> None:
    known = all(order and set(order) <= set(range(dims)) for order in orders)
    if not orders or not known or len(strides) != len(orders) or min(strides) < 1:
        raise ConfigError(
            "a scan layer needs orders of its dims, and a stride of at least 1 for each",
            f"orders {list(orders)} of {dims} dims, strides {list(strides)}",
            "pass, for example, orders=cross_orders(3)",
        )
    if conv < 0 or (conv and conv % 2 == 0):
        raise ConfigError(
            "the convolution in front of a scan has an odd number of taps, or 0 for none",
            f"conv is {conv}",
        )
