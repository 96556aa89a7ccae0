"""Which keys a query sees. Every strategy and kernel uses this one answer. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from operator import index
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xdist.documents import Documents
from xdist.errors import MaskError

Side = int | None
Window = None | int | tuple[Side, Side]
_FAR = np.iinfo(np.int64).max // 4


@dataclass(frozen=True)
class PerHead:
    """One window per query head: a list given by the user, made hashable."""

    windows: tuple[Window, ...]


class Coverage(Enum):
    """How much of a block of keys a block of queries sees."""

    EMPTY = "empty"
    PARTIAL = "partial"
    FULL = "full"


EMPTY, PARTIAL, FULL = Coverage.EMPTY, Coverage.PARTIAL, Coverage.FULL


class Spans(NamedTuple):
    """What each query sees: keys at global positions `[lo, hi)` or `[prefix_lo, prefix_hi)`.

    Four int64 arrays `[n]`, one entry per query. The two runs are disjoint; a run whose lower end
    is not below its upper end is empty. `[lo, hi)` holds the query itself where it may see itself.
    """

    lo: NDArray[np.int64]
    hi: NDArray[np.int64]
    prefix_lo: NDArray[np.int64]
    prefix_hi: NDArray[np.int64]

    def seen(self, k_start: int, k_stop: int) -> NDArray[np.int64]:
        """How many keys of `[k_start, k_stop)` each query sees, int64 `[n]`."""
        own = np.minimum(self.hi, k_stop) - np.maximum(self.lo, k_start)
        prefix = np.minimum(self.prefix_hi, k_stop) - np.maximum(self.prefix_lo, k_start)
        return np.maximum(own, 0) + np.maximum(prefix, 0)

    def block(self, k_start: int, k_stop: int) -> Coverage:
        """Whether these queries see none, all or some of the keys `[k_start, k_stop)`."""
        seen = self.seen(k_start, k_stop)
        if seen.size == 0 or not seen.any():
            return EMPTY
        return FULL if bool((seen == k_stop - k_start).all()) else PARTIAL

    def visible(self, k_positions: ArrayLike) -> NDArray[np.bool_]:
        """Dense bool `[n, m]`: query i sees the key at global position `k_positions[j]`."""
        keys = np.asarray(k_positions, dtype=np.int64)[None, :]
        own = (keys >= self.lo[:, None]) & (keys < self.hi[:, None])
        return own | ((keys >= self.prefix_lo[:, None]) & (keys < self.prefix_hi[:, None]))


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see; positions count inside a document.

    visible = same document and same chunk (`position // chunk`) and (key position < `prefix` or
    (`causal` allows and `window` allows)).

    Args:
        causal: keys after the query are hidden.
        window: `(left, right)` keys before and after the query, None is unlimited; an int w is
            `(w, 0)` when causal and `(w, w)` otherwise; a list has one entry per query head, by
            global head.
        prefix: the first `prefix` tokens of a document are visible to all of it.
        chunk: tokens see only their own run of `chunk` tokens; None is no chunks.

    Raises:
        MaskError: a negative or non-integer size (a bool is none), or causal that is not a bool.
    """

    causal: bool = True
    window: Window | list[Window] | PerHead = None
    prefix: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise MaskError("causal must be True or False", f"got {self.causal!r}")
        window = self.window
        if isinstance(window, list):
            window = PerHead(tuple(_checked_window(entry) for entry in window))
            if not window.windows:
                raise MaskError("a window list needs one entry per head", "it is empty")
        elif not isinstance(window, PerHead):
            window = _checked_window(window)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "prefix", _size("prefix", self.prefix, 0))
        if self.chunk is not None:
            object.__setattr__(self, "chunk", _size("chunk", self.chunk, 1))

    @property
    def heads(self) -> int | None:
        """How many heads a per-head window names; None when all heads share one window."""
        return len(self.window.windows) if isinstance(self.window, PerHead) else None

    def sides(self, head: int = 0) -> tuple[Side, Side]:
        """`(left, right)` of one query head after `causal`; None is unlimited."""
        window = self.window.windows[head] if isinstance(self.window, PerHead) else self.window
        assert not isinstance(window, list)  # __post_init__ made it a PerHead
        left, right = window if isinstance(window, tuple) else (window, window)
        return left, 0 if self.causal else right

    def head_groups(self, heads: int) -> list[tuple[int, int]]:
        """Runs `(start, stop)` of the `heads` query heads that share one window.

        Raises:
            MaskError: the mask names another number of heads.
        """
        if self.heads is None:
            return [(0, heads)] if heads else []
        if self.heads != heads:
            raise MaskError(
                "the mask's window list does not fit the query heads",
                f"{self.heads} windows for {heads} heads",
                "give one window per query head",
            )
        cuts = [h for h in range(heads) if h == 0 or self.sides(h) != self.sides(h - 1)]
        return list(zip(cuts, [*cuts[1:], heads], strict=True))

    def for_heads(self, start: int, stop: int) -> Mask:
        """The mask of query heads `[start, stop)` alone."""
        if not isinstance(self.window, PerHead):
            return self
        windows = PerHead(self.window.windows[start:stop]) if stop > start else None
        return Mask(self.causal, windows, self.prefix, self.chunk)

    @property
    def reach(self) -> tuple[Side, Side]:
        """The most keys before and after itself any query of any head sees; None is unlimited."""
        sides = [self.sides(head) for head in range(self.heads or 1)]
        left = None if any(a is None for a, _ in sides) else max(a or 0 for a, _ in sides)
        right = None if any(b is None for _, b in sides) else max(b or 0 for _, b in sides)
        if self.prefix:
            left = None
            right = None if right is None else max(right, self.prefix - 1)
        if self.chunk is not None:
            left = self.chunk - 1 if left is None else min(left, self.chunk - 1)
            right = self.chunk - 1 if right is None else min(right, self.chunk - 1)
        return left, right

    def spans(self, positions: ArrayLike, documents: Documents, head: int = 0) -> Spans:
        """What queries at global `positions` `[n]` of query head `head` see."""
        queries = np.asarray(positions, dtype=np.int64)
        start, stop = documents.starts(queries), documents.stops(queries)
        first, last = start, stop
        if self.chunk is not None:
            first = start + (queries - start) // self.chunk * self.chunk
            last = np.minimum(stop, first + self.chunk)
        left, right = self.sides(head)
        lo = first if left is None else np.maximum(first, queries - left)
        hi = np.minimum(last, queries + 1 + (_FAR if right is None else right))
        if not self.prefix:
            # One array for what is equal: of a long row each takes megabytes.
            return Spans(lo, hi, first, first)
        prefix_hi = np.minimum(start + self.prefix, last)
        # A prefix that touches the window joins it, so that the two runs stay disjoint.
        joined = (prefix_hi >= lo) & (prefix_hi > first)
        lo = np.where(joined, first, lo)
        hi = np.where(joined, np.maximum(hi, prefix_hi), hi)
        return Spans(lo, hi, first, np.where(joined, first, np.maximum(prefix_hi, first)))


def _checked_window(window: object) -> Window:
    if window is None:
        return None
    if isinstance(window, tuple):
        if len(window) != 2:
            raise MaskError("a window tuple is (left, right)", f"got {len(window)} entries")
        left, right = (None if side is None else _size("window", side, 0) for side in window)
        return left, right
    return _size("window", window, 0)


def _size(name: str, value: object, least: int) -> int:
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise MaskError(f"{name} must be an integer", f"got {value!r}") from error
    if isinstance(value, bool):
        # False would be a window of nothing but the token itself, not the absence of a window.
        raise MaskError(f"{name} must be an integer", f"got {value}", "leave it out for no limit")
    if number < least:
        raise MaskError(f"{name} must be at least {least}", f"got {number}")
    # Larger than any sequence: a position added to it still fits 64 bits.
    return min(number, _FAR)
