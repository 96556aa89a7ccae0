"""What a plan holds, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from xdist.cost.moves import Moved

# Ranks that are all printed; of more, a few are.
COLUMNS = 8

# What one rank sends and receives in one optimizer step, by move.
Moves = dict[str, Moved]


@dataclass(frozen=True)
class Memory:
    """Predicted peak memory of one rank, in bytes, by what holds it; the peak is their sum."""

    process: int  # interpreter, torch and what its libraries keep, before any tensor of ours
    parameters: int
    gradients: int
    optimizer: int
    engine: int  # whole parameters and buffers that an engine holds beside activations
    kept: int  # activations kept from forward to backward
    transients: int  # the largest working set of one tile, and the gradient of one activation
    update: int  # what summing gradients or updating needs beyond kept, transients and engine
    retained: int  # heap of shorter stages, or of the model before it was cut, not given back
    offloaded: int  # host memory; on a card no part of its own peak

    @property
    def tensors_bytes(self) -> int:
        """What tensors hold in forward and backward."""
        return self.parameters + self.gradients + self.engine + self.kept + self.transients

    @property
    def peak_bytes(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class StagePlan:
    """One stage of the curriculum. Lists have one entry a rank."""

    length: int
    batch: int
    steps: int
    moves: list[Moves]
    memory: list[Memory]
    flops: list[int]
    # What the engine's own library exchanges in one step, outside the ledger; None: not known.
    library: list[Moved | None]

    @property
    def sent_bytes(self) -> list[int]:
        """Bytes each rank sends in one optimizer step."""
        return [sum(t.sent_bytes for t in moves.values()) for moves in self.moves]

    @property
    def received_bytes(self) -> list[int]:
        """Bytes each rank receives in one optimizer step."""
        return [sum(t.received_bytes for t in moves.values()) for moves in self.moves]

    @property
    def peak_memory_bytes(self) -> list[int]:
        """Predicted peak resident memory of each rank."""
        return [memory.peak_bytes for memory in self.memory]


@dataclass(frozen=True)
class Plan:
    """A whole run before it starts."""

    ranks: int
    parameters: int
    stages: list[StagePlan]
    # Further lines, as they are printed: of grids where the model switches, and why.
    notes: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Aligned plain text: one line a stage, then bytes by move and memory by part."""
        head = ["length", "batch", "steps", "sent per step and rank", "peak memory", "FLOPs"]
        rows = [
            [
                f"{stage.length:,}",
                f"{stage.batch:,}",
                f"{stage.steps:,}",
                f"{_size(max(stage.sent_bytes))}",
                f"{_size(max(stage.peak_memory_bytes))}",
                f"{sum(stage.flops):.2e}",
            ]
            for stage in self.stages
        ]
        last = self.stages[-1]
        title = f"plan: {self.ranks} rank(s), {self.parameters:,} parameters; largest rank of each"
        lines = [title, *_aligned([head, *rows])]
        shown = _shown(last)
        lines.append(f"one step of {last.length:,} tokens, by move (sent, received):")
        names = sorted({name for moves in last.moves for name in moves})
        heads = [["  rank", *map(str, shown)]]
        moved = [
            [f"  {name}", *(_pair(last.moves[rank].get(name, Moved())) for rank in shown)]
            for name in names
        ]
        lines += _aligned(heads + moved) if moved else ["  nothing crosses ranks"]
        if any(one is None or any(one) for one in last.library):
            own = [last.library[rank] for rank in shown]
            said = ["not known" if one is None else _pair(one) for one in own]
            lines += _aligned([["  engine traffic", *said]])
            lines.append("  (DeepSpeed's own exchanges, which the ledger does not count)")
        lines.append("its memory:")
        parts = [part.name for part in fields(Memory)]
        lines += _aligned(
            heads
            + [
                [f"  {name}", *(_size(getattr(last.memory[rank], name)) for rank in shown)]
                for name in parts
                if any(getattr(memory, name) for memory in last.memory)
            ]
        )
        lines += self.notes
        return "\n".join(lines)


def _shown(stage: StagePlan) -> list[int]:
    """The ranks that get a column: all of a few; of many the first, the busiest, the least busy
    and the last."""
    ranks = range(len(stage.moves))
    if len(ranks) <= COLUMNS:
        return list(ranks)
    sent = stage.sent_bytes
    most, least = max(ranks, key=lambda r: sent[r]), min(ranks, key=lambda r: sent[r])
    return sorted({0, most, least, ranks[-1]})


def _pair(moved: Moved) -> str:
    return f"{moved.sent_bytes:,} / {moved.received_bytes:,} bytes"


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def _aligned(rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
