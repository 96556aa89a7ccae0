"""What `place_switches` answers: the sharded dim of each block, bytes by rank, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from xdist.cost.place_block import Block
from xdist.cost.place_spot import Option, Passes, Sizes


@dataclass(frozen=True)
class Placed:
    """One block where it stands.

    sizes: the grid in front of it; dim: what is sharded there; came_from: what was before it, the
    same where nothing is switched; switch: bytes of the switch by rank; chosen: the way of each
    need; why: what each other dim would cost the model.
    """

    block: Block
    sizes: Sizes
    dim: int
    came_from: int
    switch: tuple[Passes, ...]
    chosen: tuple[Option, ...]
    why: str

    @property
    def switches(self) -> bool:
        """Whether a switch stands in front of it."""
        return self.dim != self.came_from

    @property
    def strategy(self) -> str:
        """Of the attention over whole dims where one of them is sharded: "ulysses" or "ring";
        empty where it needs none."""
        return self.chosen[0].strategy

    @property
    def cross_strategy(self) -> str:
        """Of the attention to a sharded condition: "gather", "ulysses" or "ring"; else empty."""
        return self.chosen[1].strategy if self.block.condition else ""

    @cached_property
    def inside(self) -> tuple[Passes, ...]:
        """Bytes that its own needs move, by rank."""
        return tuple(
            sum((option.moved[rank] for option in self.chosen), Passes())
            for rank in range(len(self.switch))
        )


@dataclass(frozen=True)
class Placement:
    """A model's switches: `blocks` in order, and a last switch back to `end`.

    sizes, out_sizes: the grids in front of the model and behind it; start, end: the dims that are
    sharded there; batch: rows that the bytes are for; back: bytes of the last switch, by rank.
    """

    sizes: Sizes
    out_sizes: Sizes
    degree: int
    batch: int
    start: int
    end: int
    blocks: tuple[Placed, ...]
    back: tuple[Passes, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """The sharded dim of each block."""
        return tuple(placed.dim for placed in self.blocks)

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategy of each block's attention, empty where it needs none."""
        return tuple(placed.strategy for placed in self.blocks)

    @property
    def switches(self) -> int:
        """How many switches there are, the last one included."""
        last = self.blocks[-1].dim != self.end
        return sum(placed.switches for placed in self.blocks) + last

    @cached_property
    def moved(self) -> tuple[Passes, ...]:
        """Bytes of all switches and blocks, by rank."""
        return tuple(
            sum((p.switch[r] + p.inside[r] for p in self.blocks), self.back[r])
            for r in range(self.degree)
        )

    @cached_property
    def switched(self) -> tuple[Passes, ...]:
        """Bytes of the switches alone, by rank."""
        return tuple(
            sum((p.switch[r] for p in self.blocks), self.back[r]) for r in range(self.degree)
        )

    @property
    def why(self) -> list[str]:
        """One line a block: where it stands, what that moves, and what other dims would cost."""
        return [f"{one.block.name}: {' | '.join(filter(None, _cells(one)))}" for one in self.blocks]

    def table(self) -> str:
        """Aligned plain text: each different line once, with how many blocks it stands for."""
        busiest = max(one.sent_bytes for one in self.moved)
        lines = [
            f"placement: grid {_grid(self.sizes)} on {self.degree} rank(s), {len(self.blocks)} "
            f"block(s), {self.switches} switch(es); the busiest rank sends {busiest:,} bytes, "
            "forward and backward",
            "  (switch, inside: sent; why: what the busiest ranks send, receive and hold more)",
        ]
        counted: dict[tuple[str, ...], int] = {}
        for one in self.blocks:
            row = (one.block.name, _grid(one.sizes), *_cells(one))
            counted[row] = counted.get(row, 0) + 1
        heads = ("  block", "grid", "sharded", "switch", "inside", "why", "blocks")
        rows = [(f"  {row[0]}", *row[1:], str(count)) for row, count in counted.items()]
        lines += _aligned([heads, *rows])
        if self.blocks[-1].dim != self.end:
            sent = max(one.sent_bytes for one in self.back)
            lines.append(f"  behind: dim {self.blocks[-1].dim} to {self.end}, {sent:,} bytes")
        return "\n".join(lines)


def _cells(one: Placed) -> tuple[str, str, str, str]:
    """Sharded dim, switch, what moves inside, and other dims; bytes sent by the busiest rank."""
    switch = ""
    if one.switches:
        sent = max(passes.sent_bytes for passes in one.switch)
        switch = f"from dim {one.came_from}, {sent:,} bytes"
    names = [option.strategy for option in one.chosen if option.strategy]
    sent = max(passes.sent_bytes for passes in one.inside)
    inside = " ".join([*names, f"{sent:,} bytes"]) if sent else " ".join(names)
    return f"dim {one.dim}", switch, inside, one.why


def _grid(sizes: Sizes) -> str:
    return " x ".join(map(str, sizes))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
