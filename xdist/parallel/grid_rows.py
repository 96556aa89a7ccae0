"""A grid's tokens as rows of sequences, in any order of its dims, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from torch import Tensor

# Tokens of the rows worked on at once: enough for the matrix products, few enough for a cache.
GROUP_TOKENS = 1 << 15

Group = tuple[int | slice, ...]
"""Rows, as indices of the batch and the row dims."""


@dataclass(frozen=True)
class Rows:
    """Local tokens [B, n, ...] of the grid `sizes` (the last dim fastest) as rows of a scan.

    order: the dims that the scan runs over, from outermost to innermost; the other dims, behind
    the batch, are rows.
    """

    batch: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The dims that the scan does not run over."""
        return tuple(d for d in range(len(self.sizes)) if d not in self.order)

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        """[B, sizes of the row dims]."""
        return (self.batch, *(self.sizes[d] for d in self.row_dims))

    @cached_property
    def tokens(self) -> int:
        """Of one row."""
        return prod(self.sizes[d] for d in self.order)

    def view(self, x: Tensor) -> Tensor:
        """x [B, n, ...] as [B, row dims, dims of the order, ...]; no copy."""
        grid = x.unflatten(1, self.sizes)
        rest = range(len(self.sizes) + 1, grid.dim())
        return grid.permute(0, *(d + 1 for d in (*self.row_dims, *self.order)), *rest)

    def take(self, x: Tensor, group: Group = ()) -> Tensor:
        """The rows of a group, [rows, tokens, ...]; no copy where the strides allow it."""
        part = self.view(x)[group]
        shape = part.shape[-(len(self.order) + x.dim() - 2) :]
        rows = prod(part.shape[: part.dim() - len(shape)])
        return part.reshape(rows, self.tokens, *x.shape[2:])

    def put(self, x: Tensor, group: Group, part: Tensor) -> None:
        """Write the rows of a group into x [B, n, ...]."""
        into = self.view(x)[group]
        into.copy_(part.reshape(into.shape))

    def back(self, rows: Tensor) -> Tensor:
        """All rows [rows, tokens, ...] as [B, n, ...]: the inverse of `take`."""
        order = (*self.row_dims, *self.order)
        sizes = [self.sizes[d] for d in order]
        grid = rows.reshape(self.batch, *sizes, *rows.shape[2:])
        places = [order.index(d) + 1 for d in range(len(self.sizes))]
        rest = range(len(self.sizes) + 1, grid.dim())
        return grid.permute(0, *places, *rest).flatten(1, len(self.sizes))

    def groups(self, row_tokens: int, most_tokens: int | None = None) -> Iterator[Group]:
        """All rows, as many at a time as make `most_tokens` with `row_tokens` each, at least one.

        row_tokens: the same on every rank, where ranks are to have the same groups.
        """
        target = max(
            1, (GROUP_TOKENS if most_tokens is None else most_tokens) // max(1, row_tokens)
        )
        shape = self.row_shape
        if not prod(shape):
            return
        cut = len(shape) - 1
        while cut > 0 and prod(shape[cut:]) <= target:
            cut -= 1
        step = max(1, target // prod(shape[cut + 1 :]))
        for outer in product(*(range(size) for size in shape[:cut])):
            for start in range(0, shape[cut], step):
                yield (*outer, slice(start, min(start + step, shape[cut])))
