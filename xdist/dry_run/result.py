"""What a dry run did, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass

from xdist.cost.moves import Moved

# Sent and received bytes of one rank, by move.
Moves = dict[str, Moved]


@dataclass(frozen=True)
class Rehearsal:
    """One rank's step of one stage: what the ledger counted beside the plan.

    length, micro_steps: as run, shorter than the stage's where `shortened`.
    """

    stage: int
    rank: int
    length: int
    rows: int
    micro_steps: int
    shortened: bool
    counted: Moves
    planned: Moves
    exchanges: int
    tensor_bytes: int  # the most that tensors held at once, parameters included
    planned_tensor_bytes: int

    @property
    def agrees(self) -> bool:
        """Whether every move sent and received what was planned."""
        return self.counted == self.planned

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank sent, over all moves."""
        return sum(moved.sent_bytes for moved in self.counted.values())


@dataclass(frozen=True)
class DryRun:
    """A whole dry run. checked, unchecked: one sentence each."""

    title: str
    rehearsals: list[Rehearsal]
    checked: list[str]
    unchecked: list[str]

    @property
    def differing(self) -> list[Rehearsal]:
        """Rehearsals whose ledger is not the plan."""
        return [one for one in self.rehearsals if not one.agrees]

    def table(self) -> str:
        """Aligned plain text: a line a rehearsal, then what was checked and what was not."""
        head = ["stage", "rank", "tokens", "rows", "exchanges", "sent (bytes)", "planned",
                "tensors at the peak", "planned"]  # fmt: skip
        rows = [
            [
                str(one.stage),
                str(one.rank),
                f"{one.length:,}{'*' if one.shortened else ''}",
                f"{one.rows} x {one.micro_steps}",
                f"{one.exchanges:,}",
                f"{one.sent_bytes:,}",
                "the same" if one.agrees else f"{_sent(one.planned):,}",
                _size(one.tensor_bytes),
                _size(one.planned_tensor_bytes),
            ]
            for one in self.rehearsals
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        lines += ["checked:", *(f"  {line}" for line in self.checked)]
        lines += ["not checked:", *(f"  {line}" for line in self.unchecked)]
        return "\n".join([self.title, *lines])


def _sent(moves: Moves) -> int:
    return sum(moved.sent_bytes for moved in moves.values())


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"
