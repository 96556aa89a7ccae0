"""What one block of an N-D model needs of its grid."""

from __future__ import annotations

from dataclasses import dataclass

from xdist.cost.place_attention import Condition, Heads
from xdist.cost.place_spot import Reach, Sizes, at_least
from xdist.errors import ConfigError, LayoutError

ITEMSIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Block:
    """What one block of a model needs.

    Args:
        name: for the plan's lines.
        channels: of its input, as a switch in front of it moves them.
        whole: dims that it must see whole. Such a dim can be sharded only with `heads`.
        heads: of its attention over the dims of `whole`, flattened: where one of them is sharded
            it becomes Ulysses or ring. None: it can become neither.
        reach: what it reads beyond each position otherwise; may change the grid.
        condition: what its cross-attention attends to.
        itemsize: bytes an element.
        out_channels: of its output, where a switch behind the last block moves them; None: those
            of its input.

    Raises:
        ShapeError: numbers below 1, or a dim named twice.
    """

    name: str
    channels: int
    whole: tuple[int, ...] = ()
    heads: Heads | None = None
    reach: tuple[Reach, ...] = ()
    condition: Condition | None = None
    itemsize: int = 4
    out_channels: int | None = None

    def __post_init__(self) -> None:
        where = f"of block {self.name!r}"
        at_least(f"channels {where}", self.channels, 1)
        at_least(f"out_channels {where}", self.behind, 1)
        at_least(f"whole {where}", self.whole, 0)
        if len(set(self.whole)) != len(self.whole):
            raise ConfigError(f"whole {where} names a dim twice", f"{self.whole}")
        if self.itemsize not in ITEMSIZES:
            raise ConfigError(f"itemsize {where} is {self.itemsize}", "", f"one of {ITEMSIZES}")

    @property
    def behind(self) -> int:
        """Channels of its output."""
        return self.channels if self.out_channels is None else self.out_channels

    def grid(self, sizes: Sizes) -> Sizes:
        """The grid behind it.

        Raises:
            LayoutError: a dim that the grid does not have.
            ShapeError: a reach that does not fit.
        """
        if self.whole and max(self.whole) >= len(sizes):
            raise LayoutError(
                f"block {self.name!r} needs the dims {self.whole} whole",
                f"the grid {sizes} has {len(sizes)}",
                "count from 0",
            )
        for reach in self.reach:
            sizes = reach.grid(sizes)
        return sizes
