"""Which attention probabilities are dropped: a hash of positions, head and row, not a stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dropped:
    """One call's dropout. `key` holds 64 bits of (seed, step, layer); `first_row` and `first_head`
    are the global numbers of the tensors' batch row 0 and query head 0; `q_positions` int64 `[n]`
    are the queries' global positions."""

    rate: float
    key: int
    first_row: int
    first_head: int
    q_positions: Tensor
