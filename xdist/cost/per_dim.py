"""Settings of a grid that are one integer for all of its dims, or one a dim."""

from __future__ import annotations

from collections.abc import Sequence

from xdist.errors import ShapeError

PerDim = int | Sequence[int]


def per_dim(name: str, value: PerDim, dims: int, *, least: int | None = 1) -> tuple[int, ...]:
    """One integer for each dim: the same for all, or as given.

    least: None where the caller bounds them, with better words.

    Raises:
        ShapeError: another number of them, no integers, or one below `least`.
    """
    found = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    integers = all(isinstance(n, int) and not isinstance(n, bool) for n in found)
    if len(found) != dims or not integers or (least is not None and min(found) < least):
        bound = "" if least is None else f" of at least {least}"
        raise ShapeError(
            f"{name} is an integer{bound}, or one for each of {dims} dims", f"got {value!r}"
        )
    return found
