"""What an engine tells a checkpoint: whole tensors (`Spec`), and the runs a rank holds (`Piece`).

Both speak of the *whole* tensor in row-major (C) order, never of an engine's layout. So a
checkpoint that one engine wrote on any number of ranks is read by any other engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """A whole tensor of a checkpoint, as every rank knows it.

    Attributes:
        shape: the whole tensor's shape; `()` for a scalar.
        dtype: the dtype its elements are stored in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Elements of the whole tensor (1 for a scalar)."""
        return math.prod(self.shape)

    def zeros(self) -> torch.Tensor:
        """A tensor of this shape and dtype, on the CPU."""
        return torch.zeros(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Piece:
    """A run of a whole tensor's elements, in row-major order, that this rank writes.

    Over all ranks the pieces of a name hold each of its elements exactly once. A rank that holds
    none of a tensor leaves the name out.

    Attributes:
        shape: the whole tensor's shape.
        start: index, in the flattened whole tensor, of `values[0]`.
        values: 1-D, on any device, in the spec's dtype. It may share memory with the engine's
            own tensors: the checkpoint copies it before the next update.
    """

    shape: tuple[int, ...]
    start: int
    values: torch.Tensor
