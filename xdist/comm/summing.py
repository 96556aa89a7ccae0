"""What is added across ranks is added in float32 (float64 for float64), in rank order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a sum over ranks travels and is added in; integers are added as int64."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32 if dtype.is_floating_point else torch.int64


def add_in_rank_order(parts: Mapping[int, Tensor]) -> Tensor:
    """The sum of the parts, lowest rank first, so that it has the same bits on every run."""
    first, *rest = sorted(parts)
    total = parts[first].clone()
    for rank in rest:
        total += parts[rank]
    return total


def offsets(sizes: list[int] | tuple[int, ...]) -> list[int]:
    """Where each share starts: `[0, sizes[0], sizes[0] + sizes[1], ...]`."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found
