"""One rank's share of a grid of tokens: mesh, sizes and the dim that is sharded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from operator import index

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup
from xdist.comm.switch import Switch, switch_many
from xdist.comm.window import window_many
from xdist.errors import LayoutError, ShapeError
from xdist.layout import Layout, even_sizes
from xdist.mesh import Mesh
from xdist.shard import DerivedShard, SequenceShard, agree


class GridShard:
    """What this rank holds of tensors `[B, S1, ..., Sk, ...]`, whose grid is `sizes` = (S1..Sk).

    One dim of the grid is sharded, in runs as `torch.tensor_split` cuts them (uneven where they
    must be, empty where there are fewer positions than ranks); the others are whole. Dims are
    numbered in the grid: dim d is dim d + 1 of a tensor. Behind the grid a tensor may have any
    dims, channels or heads.

    All ranks of a sequence group make it with the same sizes and dim; they are compared once (32
    control bytes to each other rank). `along`, `resized` and `switch` give other shards of the same
    mesh and exchange no more: grids of several resolutions live side by side.

    Raises:
        LayoutError: no sizes, a size below 1, or a dim that the grid does not have.
        DesyncError: the ranks of the sequence group have different sizes or dims.
    """

    def __init__(self, mesh: Mesh, sizes: Sequence[int], dim: int = 0) -> None:
        self.mesh = mesh
        self.sizes = _checked_sizes(sizes)
        self.dim = _checked_dim(dim, self.sizes)
        self._compare()

    def _compare(self) -> None:
        agree(
            self.mesh.sequence_group,
            [self.sizes, self.dim],
            "the ranks of one sequence hold different grids",
            "make GridShard with the same sizes and dim on every rank",
        )

    # --- what this rank holds ------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank's place among the sequence ranks."""
        return self.mesh.sequence_rank

    @property
    def size(self) -> int:
        """How many ranks share the grid."""
        return self.mesh.sequence_size

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of the sequence ranks; None where there is one."""
        return self.mesh.sequence_group

    @cached_property
    def layout(self) -> Layout:
        """Which positions along the sharded dim each rank holds."""
        return Layout.contiguous(self.sizes[self.dim], self.size)

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Positions along the sharded dim, by rank."""
        return tuple(even_sizes(self.sizes[self.dim], self.size))

    @property
    def start(self) -> int:
        """This rank's first position along the sharded dim."""
        return sum(self.shares[: self.rank])

    @property
    def stop(self) -> int:
        """One past this rank's last position along the sharded dim."""
        return self.start + self.shares[self.rank]

    @cached_property
    def local_sizes(self) -> tuple[int, ...]:
        """The grid of this rank's part."""
        return self.sizes_of(self.rank)

    def sizes_of(self, rank: int) -> tuple[int, ...]:
        """The grid of the part that `rank` holds."""
        found = list(self.sizes)
        found[self.dim] = self.shares[rank]
        return tuple(found)

    def positions(self, dim: int) -> Tensor:
        """Global position along `dim` of each index of this rank's part, int64, on its device."""
        dim = _checked_dim(dim, self.sizes)
        start = self.start if dim == self.dim else 0
        stop = start + self.local_sizes[dim]
        return torch.arange(start, stop, device=self.mesh.device)

    # --- other shards of the same mesh ---------------------------------------------------------

    def along(self, dim: int) -> GridShard:
        """The same grid with `dim` sharded."""
        dim = _checked_dim(dim, self.sizes)
        return self if dim == self.dim else _Derived(self.mesh, self.sizes, dim)

    def resized(self, sizes: Sequence[int]) -> GridShard:
        """A grid of other sizes, of as many dims, with the same dim sharded."""
        if len(sizes) != len(self.sizes):
            raise LayoutError(
                "resized keeps the number of dims", f"{len(sizes)} sizes for {len(self.sizes)} dims"
            )
        same = tuple(sizes) == self.sizes
        return self if same else _Derived(self.mesh, sizes, self.dim)

    @cached_property
    def flattened(self) -> SequenceShard:
        """The shard of the grid's tokens as one sequence, the last dim running fastest.

        A local part, its grid dims flattened, is in the order of this shard's segments: one a rank
        where dim 0 is sharded, else one for each position in front of the sharded dim.
        """
        outer, inner = prod(self.sizes[: self.dim]), prod(self.sizes[self.dim + 1 :])
        whole = self.sizes[self.dim] * inner
        held = []
        for rank in range(self.size):
            start = sum(self.shares[:rank]) * inner
            stop = start + self.shares[rank] * inner
            held.append([(o * whole + start, o * whole + stop) for o in range(outer)])
        return DerivedShard(self.mesh, Layout.from_segments(outer * whole, held))

    # --- moves ---------------------------------------------------------------------------------

    def switch(self, x: Tensor, dim: int) -> tuple[Tensor, GridShard]:
        """x with grid dim `dim` sharded in place of this one, and the shard that says so.

        One all-to-all: each rank sends (P-1)/P of its part, backward likewise. The identity where
        `dim` is sharded already.
        """
        (found,), target = self.switch_many([x], dim)
        return found, target

    def switch_many(self, tensors: Sequence[Tensor], dim: int) -> tuple[list[Tensor], GridShard]:
        """`switch` of several tensors on this grid in one exchange."""
        target = self.along(dim)
        for x in tensors:
            self.check(x)
        if target.dim == self.dim:
            return list(tensors), self
        plan = Switch(self.dim + 1, target.dim + 1, self.shares, target.shares)
        return switch_many(tensors, [plan] * len(tensors), self.group), target

    def window_many(
        self, tensors: Sequence[Tensor], windows: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """This rank's window of each tensor along the sharded dim, from whoever holds it.

        windows: `[start, stop)` of every rank, inside the grid. One exchange; backward the
        gradients return, added in float32 (float64 for float64).
        """
        for x in tensors:
            self.check(x)
        return window_many(tensors, self.layout, self.group, dim=self.dim + 1, windows=windows)

    def window(self, x: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
        """`window_many` of one tensor."""
        return self.window_many([x], windows)[0]

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's part of the whole `x` `[B, S1, ..., Sk, ...]`. Nothing moves.

        Backward: this rank's slice, zero elsewhere.
        """
        _check_grid(x, self.sizes, "scatter takes the whole grid")
        return self._sharded.scatter(x, self.dim + 1)

    def gather(self, x: Tensor) -> Tensor:
        """The whole grid from each rank's part `x`, on every rank; backward a reduce-scatter."""
        self.check(x)
        return self._sharded.gather(x, self.dim + 1)

    def check(self, x: Tensor) -> None:
        """Raises ShapeError where x is not this rank's part."""
        _check_grid(
            x,
            self.local_sizes,
            f"rank {self.rank} of {self.size} holds a part of {self.sizes}, sharded along dim "
            f"{self.dim}",
        )

    @cached_property
    def _sharded(self) -> SequenceShard:
        return DerivedShard(self.mesh, self.layout)

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same shares on the same mesh."""
        if not isinstance(other, GridShard):
            return NotImplemented
        mine, yours = (self.sizes, self.dim), (other.sizes, other.dim)
        return mine == yours and self.mesh == other.mesh

    def __hash__(self) -> int:
        return hash((self.sizes, self.dim))

    def __repr__(self) -> str:
        return f"GridShard(sizes={self.sizes}, dim={self.dim}, rank {self.rank} of {self.size})"


class _Derived(GridShard):
    """A shard that follows from one whose ranks were compared."""

    def _compare(self) -> None:
        """Nothing is exchanged."""


def resolve_grid(gshard: GridShard | None, x: Tensor, dims: int) -> GridShard:
    """`gshard`, checked to hold x, or for None the grid of one rank: x's `dims` dims behind B."""
    if gshard is None:
        if x.dim() < dims + 1:
            raise ShapeError(
                f"x needs a batch and {dims} grid dims", f"it has shape {tuple(x.shape)}"
            )
        return GridShard(Mesh.one_rank(), x.shape[1 : dims + 1])
    if len(gshard.sizes) != dims:
        raise ShapeError(
            f"the grid shard has {len(gshard.sizes)} dims",
            f"{dims} are needed",
            "pass its own shard",
        )
    gshard.check(x)
    return gshard


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(index(size) for size in sizes)
    except TypeError as error:
        raise LayoutError("the sizes of a grid are integers", f"got {sizes!r}") from error
    if not found or min(found) < 1:
        raise LayoutError("a grid needs at least one dim, of at least 1 each", f"got {found}")
    return found


def _checked_dim(dim: int, sizes: tuple[int, ...]) -> int:
    if not -len(sizes) <= dim < len(sizes):
        raise LayoutError(
            f"dim {dim} is no dim of the grid", f"it has {len(sizes)}: {sizes}", "count from 0"
        )
    return dim % len(sizes)


def _check_grid(x: Tensor, sizes: tuple[int, ...], remedy: str) -> None:
    found = tuple(x.shape[1 : len(sizes) + 1])
    if found != sizes:
        raise ShapeError(
            f"x has the grid {found} behind its batch dim, in shape {tuple(x.shape)}",
            f"needed: {sizes}",
            remedy,
        )
