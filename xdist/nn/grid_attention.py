"""Layers of attention on grids: y = layer(x, gshard), `[B, s1..sk, C] -> [B, s1..sk, C]`.

x is this rank's part of a grid under `gshard` (None: one device); y lies likewise. Projections act
on each position alone; what moves is said with each layer. Parameters are held whole on every rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xdist import ops
from xdist.cost.axial import Axial, axial_choice, axial_switch_dim, check_axial
from xdist.cost.per_dim import PerDim
from xdist.errors import ConfigError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.mask import Mask
from xdist.nn.heads import heads_of, shared_heads
from xdist.parallel.grid_windows import Dealt, check_grid


class _Projected(nn.Module):
    """Queries, keys and values of each position, and the projection behind attention."""

    def __init__(self, name: str, dim: int, head_dim: int, key_heads: int | None) -> None:
        super().__init__()
        self.heads = heads_of(name, dim, head_dim)
        self.key_heads = shared_heads(name, self.heads, key_heads)
        self.head_dim = head_dim
        self.q = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.kv = nn.Parameter(torch.randn(2 * self.key_heads * head_dim, dim) * dim**-0.5)
        self.out = nn.Parameter(torch.randn(dim, dim) * dim**-0.5 / math.sqrt(2.0))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[.., H, D]`, k and v `[.., G, D]`."""
        q = (x @ self.q.t()).unflatten(-1, (self.heads, self.head_dim))
        kv = (x @ self.kv.t()).unflatten(-1, (2, self.key_heads, self.head_dim))
        k, v = kv.unbind(-3)
        return q, k, v

    def join(self, y: Tensor) -> Tensor:
        """[.., H, D] -> [.., C]."""
        return y.flatten(-2) @ self.out.t()


def _bias(
    name: str, wanted: bool, heads: int, sizes: PerDim, dims: int | None
) -> nn.Parameter | None:
    """Where wanted, a table of zeros `[H, 2 w - 1 of each dim]`."""
    if not wanted:
        return None
    if isinstance(sizes, int):
        if dims is None:
            raise ConfigError(
                f"mixer {name!r}: a position bias has a size for each dim of the grid",
                f"{sizes} is for any number of dims",
                "pass dims=, or one size for each dim",
            )
        sizes = (sizes,) * dims
    return nn.Parameter(torch.zeros(heads, *(2 * size - 1 for size in sizes)))


class NeighborhoodAttention(_Projected):
    """Attention to the window around each position; see `xdist.neighborhood_attention`.

    window, dilation: one for all dims or one a dim. position_bias: a learned bias by relative
    position (with an integer window, `dims` says how many dims the grid has). Moves the halo of k
    and v along the sharded dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: PerDim,
        dilation: PerDim = 1,
        head_dim: int = 32,
        key_heads: int | None = None,
        position_bias: bool = False,
        dims: int | None = None,
    ) -> None:
        name = "neighborhood_attention"
        super().__init__(name, dim, head_dim, key_heads)
        self.window, self.dilation = window, dilation
        self.position_bias = _bias(name, position_bias, self.heads, window, dims)

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        q, k, v = self.project(x)
        y = ops.neighborhood_attention(
            q,
            k,
            v,
            gshard,
            window=self.window,
            dilation=self.dilation,
            position_bias=self.position_bias,
        )
        return self.join(y)


class WindowAttention(_Projected):
    """Attention inside blocks; see `xdist.window_attention`.

    Swin: pairs of layers, shift 0 and shift window // 2, with position_bias. MaxViT's block
    attention: shift 0. Moves the halo of k and v along the sharded dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: PerDim,
        shift: PerDim = 0,
        head_dim: int = 32,
        key_heads: int | None = None,
        position_bias: bool = False,
        dims: int | None = None,
    ) -> None:
        super().__init__("window_attention", dim, head_dim, key_heads)
        self.window, self.shift = window, shift
        self.position_bias = _bias("window_attention", position_bias, self.heads, window, dims)

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        q, k, v = self.project(x)
        y = ops.window_attention(
            q,
            k,
            v,
            gshard,
            window=self.window,
            shift=self.shift,
            position_bias=self.position_bias,
        )
        return self.join(y)


class GridAttention(_Projected):
    """Attention inside sets spread over the whole grid; see `xdist.grid_attention`.

    Moves its input so that each rank holds whole sets, and its output back: 2 (P-1)/P of a local
    tensor, whatever the heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: PerDim,
        head_dim: int = 32,
        key_heads: int | None = None,
        position_bias: bool = False,
        dims: int | None = None,
    ) -> None:
        super().__init__("grid_attention", dim, head_dim, key_heads)
        self.grid = grid
        self.position_bias = _bias("grid_attention", position_bias, self.heads, grid, dims)

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        gshard = resolve_grid(gshard, x, x.dim() - 2)
        dealt = Dealt(gshard, check_grid("grid_attention", self.grid, x.dim() - 2))
        q, k, v = self.project(dealt.there(x))
        y = dealt.attend(q, k, v, position_bias=self.position_bias)
        return dealt.back(self.join(y))


class AxialAttention(_Projected):
    """Attention along grid dim `along`; see `xdist.axial_attention`.

    Where `along` is sharded: by "switch" its input leaves for another dim and its output returns,
    2 (P-1)/P of a local tensor; "ulysses" and "ring" move q, k, v and the result; "auto" takes the
    fewest bytes. In a placed model `along` is whole and nothing moves.
    """

    def __init__(
        self,
        dim: int,
        *,
        along: int,
        causal: bool = False,
        head_dim: int = 32,
        key_heads: int | None = None,
        strategy: str = "auto",
    ) -> None:
        super().__init__("axial_attention", dim, head_dim, key_heads)
        self.along, self.strategy = along, strategy
        self.mask = Mask(causal=causal)

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        gshard = resolve_grid(gshard, x, x.dim() - 2)
        strategy = self._strategy(x, gshard)
        if strategy != "switch":
            return self._attend(x, gshard, strategy)
        to = axial_switch_dim(gshard.sizes, gshard.dim, gshard.size)
        x, elsewhere = gshard.switch(x, to)
        return elsewhere.switch(self._attend(x, elsewhere, "auto"), gshard.dim)[0]

    def _strategy(self, x: Tensor, gshard: GridShard) -> str:
        """ "switch" where the input is to leave; else what `xdist.axial_attention` is to take."""
        check_axial(gshard.sizes, self.strategy)
        if gshard.along(self.along).dim != gshard.dim or gshard.size == 1:
            return "auto"
        if self.strategy != "auto":
            return self.strategy
        heads = (self.heads, self.key_heads, self.head_dim, self.head_dim)
        sizes = (x.shape[0], *heads, x.element_size())
        moved = (x.shape[-1], x.shape[-1])
        return axial_choice(Axial(gshard.sizes, gshard.dim, gshard.size, self.mask, *sizes, moved))

    def _attend(self, x: Tensor, gshard: GridShard, strategy: str) -> Tensor:
        q, k, v = self.project(x)
        y = ops.axial_attention(q, k, v, gshard, dim=self.along, mask=self.mask, strategy=strategy)
        return self.join(y)
