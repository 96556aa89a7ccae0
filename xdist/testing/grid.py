"""What law 1 is tested on: layouts, the error measure, and memory that is never zero by luck."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
from torch import Tensor

from xdist.layout import Layout


def layouts(n: int, parts: int, seed: int = 0) -> dict[str, Layout]:
    """The layouts law 1 is tested on, by name, for `n` tokens on `parts` ranks.

    contiguous, zigzag, drawn (random cuts dealt to random ranks, in any order), uneven (very
    different shares) and empty (the last rank, and with three or more also the first, hold
    nothing).
    """
    found = {"contiguous": Layout.contiguous(n, parts), "zigzag": Layout.zigzag(n, parts)}
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.integers(0, n + 1, size=3 * parts).tolist()), n]
    runs = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    held: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for number in rng.permutation(len(runs)).tolist():
        held[int(rng.integers(parts))].append(runs[number])
    found["drawn"] = Layout.from_segments(n, held)
    first = n - n // 4
    rest = [first + n // 4 * k // max(1, parts - 1) for k in range(parts)]
    uneven = [[(0, rest[0])], *([(rest[k - 1], rest[k])] for k in range(1, parts))]
    uneven[-1] = [(uneven[-1][0][0], n)]
    found["uneven"] = Layout.from_segments(n, uneven)
    holders = list(range(parts))[1 if parts > 2 else 0 : parts - 1] or [0]
    shares = Layout.contiguous(n, len(holders))
    empty: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for place, rank in enumerate(holders):
        empty[rank] = shares.segments(place)
    found["empty"] = Layout.from_segments(n, empty)
    return found


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max|value - reference| / max|reference| in float64; infinite where either is not finite.

    Two empty tensors agree; a reference of zeros asks for zeros (0 or infinity).
    """
    a, b = value.detach().double().cpu(), reference.detach().double().cpu()
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    difference, size = float((a - b).abs().max()), float(b.abs().max())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, `torch.empty` and its kin come filled with NaN (integers: the largest value).

    A hole in an output then fails a test instead of reading zeros by luck.
    """
    determinism: Any = torch.utils.deterministic
    filled = determinism.fill_uninitialized_memory
    on = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    determinism.fill_uninitialized_memory = True
    try:
        yield
    finally:
        determinism.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
