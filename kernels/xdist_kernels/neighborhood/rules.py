"""Which positions of one dim a position sees, as integers.

A query of a grid sees the keys whose place along every dim is seen by its own: the product of one
rule a dim. Seen positions are `first, first + step, ...`, as many as `keys` says; queries of one
residue class modulo `step` see keys of that class, and of two such queries the later one's keys
start no earlier.

Sources: Near: Hassani & Shi, "Dilated Neighborhood Attention Transformer" (2022), section 3;
Hassani et al., "Neighborhood Attention Transformer" (2023), equation 2. Blocks: Liu et al., "Swin
Transformer" (2021), section 3.2. Strided: Tu et al., "MaxViT" (2022), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from xdist_kernels.errors import KernelError


class Rule(Protocol):
    """What one dim of `size` positions sees of itself."""

    def __hash__(self) -> int: ...

    @property
    def size(self) -> int:
        """Positions of the whole dim."""

    @property
    def step(self) -> int:
        """Distance between the keys of one query."""

    @property
    def most_rows(self) -> int:
        """Queries of one class that may share a tile."""

    @property
    def reach(self) -> int:
        """A key lies fewer than this many steps from its query."""

    def keys(self, position: int) -> tuple[int, int]:
        """The first key of a query, and how many there are."""

    def columns(self, rows: int) -> int:
        """At most how many keys `rows` neighbouring queries of one class see together."""


@dataclass(frozen=True)
class Near:
    """The `window` positions of the query's class modulo `dilation` that lie nearest to it.

    At the borders the window is pushed inside, so that every query sees exactly `window` keys.
    """

    size: int
    window: int
    dilation: int = 1

    def __post_init__(self) -> None:
        if self.window < 1 or self.window % 2 == 0 or self.dilation < 1:
            raise KernelError(
                f"a window is odd and from 1, a dilation from 1; got {self.window} and "
                f"{self.dilation}"
            )
        if self.window * self.dilation > self.size:
            raise KernelError(
                f"window {self.window} x dilation {self.dilation} = "
                f"{self.window * self.dilation} exceeds a dim of {self.size} positions"
            )

    @property
    def step(self) -> int:
        return self.dilation

    @property
    def most_rows(self) -> int:
        return -(-self.size // self.dilation)

    @property
    def reach(self) -> int:
        return self.window

    def keys(self, position: int) -> tuple[int, int]:
        place, residue = divmod(position, self.dilation)
        members = -(-(self.size - residue) // self.dilation)
        first = min(max(place - self.window // 2, 0), members - self.window)
        return residue + first * self.dilation, self.window

    def columns(self, rows: int) -> int:
        return min(self.window + rows - 1, self.most_rows)


@dataclass(frozen=True)
class Blocks:
    """All positions of the query's block. Blocks of `window` start at shift, shift + window, ...

    The first and the last block hold what is left: nothing is padded, nothing wraps around.
    """

    size: int
    window: int
    shift: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.shift < self.window:
            raise KernelError(
                f"a window is from 1 and its shift from 0 and smaller; got {self.window} and "
                f"{self.shift}"
            )

    @property
    def step(self) -> int:
        return 1

    @property
    def most_rows(self) -> int:
        return min(self.window, self.size)

    @property
    def reach(self) -> int:
        return self.window

    def keys(self, position: int) -> tuple[int, int]:
        start = (position - self.shift) // self.window * self.window + self.shift
        stop = min(start + self.window, self.size)
        return max(start, 0), stop - max(start, 0)

    def columns(self, rows: int) -> int:
        return min(self.window, self.size)


@dataclass(frozen=True)
class Strided:
    """All positions of the query's class modulo `step`."""

    size: int
    step: int

    def __post_init__(self) -> None:
        if self.step < 1:
            raise KernelError(f"a step is from 1; got {self.step}")

    @property
    def most_rows(self) -> int:
        return max(1, -(-self.size // self.step))

    @property
    def reach(self) -> int:
        return self.most_rows

    def keys(self, position: int) -> tuple[int, int]:
        residue = position % self.step
        return residue, -(-(self.size - residue) // self.step)

    def columns(self, rows: int) -> int:
        return self.most_rows


def span(rule: Rule, start: int, stop: int) -> tuple[int, int]:
    """`[low, high)`: from the first to the last key that queries `[start, stop)` see."""
    if start >= stop:
        return 0, 0
    # Of each class the first query sees the earliest key and the last one the latest.
    heads = range(start, min(start + rule.step, stop))
    tails = range(max(start, stop - rule.step), stop)
    low = min(rule.keys(position)[0] for position in heads)
    ends = [(first + (count - 1) * rule.step + 1) for first, count in map(rule.keys, tails)]
    return low, max(ends)
