"""Patches of a grid as tokens, and tokens as patches: embedding and merging over shard borders.

Sharded before and after: the grid and the grid of its patches along the same dim, each in shares as
    `torch.tensor_split` cuts them; so a patch may straddle the border between two shares.
Moves: the positions of this rank's patches that other ranks hold, in their dtype; backward their
    gradients return in float32 or wider. At most a few positions at each border, however long the
    dim is.
Saved for backward: nothing but what the layers behind keep.
Must divide: nothing. Where patches do not divide a dim the last one is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn
from torch.nn.functional import pad

from xdist.comm.window import window
from xdist.cost.conv_nd import even_windows, patch_sizes, patch_windows
from xdist.cost.per_dim import PerDim, per_dim
from xdist.errors import ShapeError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.layout import Layout


def patches(
    x: Tensor, gshard: GridShard | None, patch: PerDim, fill: float = 0
) -> tuple[Tensor, GridShard]:
    """Each patch of the grid as one token, and the shard of the grid of patches.

    x: `[B, S1, ..., Sk, C]`, or `[B, S1, ..., Sk]` with one value a position (labels, of any
    dtype; they need `gshard` or a patch size for each dim). Returns tokens
    `[B, T1, ..., Tk, p1 * ... * pk * C]`, Ti = ceil(Si / pi): a patch's positions in row-major
    order, each with its channels. Positions beyond the grid hold `fill` and take no gradient.

    Raises:
        ShapeError: x is not this rank's part, or patch sizes below 1 or not one for each dim.
    """
    gshard, sides = _resolved(x, gshard, patch)
    if x.dim() == len(sides) + 1:
        x = x.unsqueeze(-1)
    elif x.dim() != len(sides) + 2:
        raise ShapeError(
            f"x needs a batch, {len(sides)} grid dims and at most one of channels",
            f"it has shape {tuple(x.shape)}",
        )
    grid = gshard.resized(patch_sizes(gshard.sizes, sides))
    windows = patch_windows(gshard.sizes[gshard.dim], sides[gshard.dim], gshard.size)
    x = gshard.window(x, windows)
    short = [
        tokens * side - size
        for tokens, side, size in zip(grid.local_sizes, sides, x.shape[1:-1], strict=True)
    ]
    if any(short):
        x = pad(x, [0, 0, *(n for size in reversed(short) for n in (0, size))], value=fill)
    for dim, both in enumerate(zip(grid.local_sizes, sides, strict=True)):
        x = x.unflatten(1 + 2 * dim, both)
    return _grouped(x, len(sides)).flatten(len(sides) + 1), grid


def unpatches(
    tokens: Tensor, gshard: GridShard | None, sizes: Sequence[int], patch: PerDim
) -> tuple[Tensor, GridShard]:
    """The inverse of `patches`: the grid of `sizes` from its patches, and the shard of that grid.

    tokens: `[B, T1, ..., Tk, p1 * ... * pk * C]`, this rank's part under `gshard`, the shard of the
    grid of patches. Returns `[B, S1, ..., Sk, C]`; what a patch holds beyond the grid is left out.

    Raises:
        ShapeError: tokens are not this rank's part, sizes that have another grid of patches, or
            token channels that the positions of a patch do not divide.
    """
    gshard, sides = _resolved(tokens, gshard, patch, len(sizes))
    if patch_sizes(sizes, sides) != gshard.sizes or tokens.dim() != len(sides) + 2:
        raise ShapeError(
            f"a grid of {tuple(sizes)} has {patch_sizes(sizes, sides)} patches of {sides}",
            f"the grid of tokens is {gshard.sizes}; tokens have shape {tuple(tokens.shape)}",
            "pass the sizes of the grid that was cut into patches",
        )
    if tokens.shape[-1] % prod(sides):
        raise ShapeError(
            "tokens hold the channels of each position of a patch",
            f"{tokens.shape[-1]} channels for {prod(sides)} positions",
        )
    target, dim = gshard.resized(sizes), gshard.dim
    windows = patch_windows(sizes[dim], sides[dim], gshard.size)
    x = _spread(tokens.unflatten(-1, (*sides, -1)), len(sides))
    held = list(sizes)
    held[dim] = windows[gshard.rank][1] - windows[gshard.rank][0]
    for d, size in enumerate(held):
        x = x.narrow(d + 1, 0, size)
    layout = Layout.from_segments(sizes[dim], [[one] for one in windows])
    shares = even_windows(sizes[dim], gshard.size)
    return window(x, layout, gshard.group, dim=dim + 1, windows=shares), target


class PatchEmbed(nn.Module):
    """Tokens from patches: a linear map of each patch's values (a convolution whose stride is its
    kernel; Dosovitskiy et al. 2021, equation 1).

    Where patches do not divide the grid the last ones are filled with zeros.
    """

    def __init__(
        self, in_channels: int, dim: int, patch: Sequence[int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch = tuple(patch)
        self.projection = nn.Linear(prod(self.patch) * in_channels, dim, bias=bias)

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> tuple[Tensor, GridShard]:
        """`[B, S1, ..., Sk, C]` to tokens `[B, T1, ..., Tk, dim]` and their shard."""
        tokens, grid = patches(x, gshard, self.patch)
        return self.projection(tokens), grid


class PatchMerge(nn.Module):
    """Neighbouring tokens joined into one: the channels of a patch of tokens are normalised and
    mapped to `out_dim`, twice as many as before (Liu et al. 2021, Swin, section 3.1).

    A grid that patches do not divide is filled with zeros. A patch's tokens are in row-major order;
    Swin's released weights have the first dim run fastest.
    """

    def __init__(self, dim: int, patch: Sequence[int], *, out_dim: int | None = None) -> None:
        super().__init__()
        self.patch = tuple(patch)
        joined = prod(self.patch) * dim
        self.norm = nn.LayerNorm(joined)
        self.reduction = nn.Linear(joined, 2 * dim if out_dim is None else out_dim, bias=False)

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> tuple[Tensor, GridShard]:
        """`[B, T1, ..., Tk, dim]` to `[B, T1', ..., Tk', out_dim]` and the coarser shard."""
        tokens, grid = patches(x, gshard, self.patch)
        return self.reduction(self.norm(tokens)), grid


def _resolved(
    x: Tensor, gshard: GridShard | None, patch: PerDim, dims: int | None = None
) -> tuple[GridShard, tuple[int, ...]]:
    """The shard, and a patch size for each dim. One number alone means all dims between batch and
    channels."""
    if gshard is not None:
        dims = len(gshard.sizes)
    elif dims is None:
        dims = x.dim() - 2 if isinstance(patch, int) else len(patch)
    return resolve_grid(gshard, x, dims), per_dim("patch", patch, dims)


def _grouped(x: Tensor, dims: int) -> Tensor:
    """[B,T1,p1,T2,p2,..,C] -> [B,T1,T2,..,p1,p2,..,C]."""
    grid = range(1, 2 * dims, 2)
    return x.permute(0, *grid, *(d + 1 for d in grid), 2 * dims + 1)


def _spread(x: Tensor, dims: int) -> Tensor:
    """[B,T1,T2,..,p1,p2,..,C] -> [B,T1*p1,T2*p2,..,C]."""
    order = [d for dim in range(dims) for d in (dim + 1, dim + 1 + dims)]
    x = x.permute(0, *order, 2 * dims + 1)
    for dim in range(dims):
        x = x.flatten(dim + 1, dim + 2)
    return x
