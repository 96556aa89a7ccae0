"""What a resumed run may change: degrees and layout freely, the order of samples never."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from xdist.errors import CheckpointError, GeometryError


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run that a checkpoint keeps, to be compared when it resumes.

    `ranks` is data x ring x ulysses. `batch` is the global batch of sequences per optimizer step
    (micro-steps included) and `length` the sequence length, both at the step that comes next;
    `seed` is the run's.
    """

    ranks: int
    data: int
    ring: int
    ulysses: int
    layout: str
    batch: int
    length: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RunFacts:
        """Read back `to_json`.

        Raises:
            CheckpointError: other fields, or of another type.
        """
        wanted = {field.name for field in fields(cls)}
        integers = {name: saved.get(name) for name in wanted - {"layout"}}
        if set(saved) != wanted or any(type(value) is not int for value in integers.values()):
            raise CheckpointError(
                "the checkpoint's state does not describe its run",
                f"want {sorted(wanted)}, got {dict(saved)}",
            )
        return cls(**saved)


def resume_line(saved: RunFacts, now: RunFacts, cursor: int, *, changing: bool = False) -> str:
    """The line a resumed run prints: what changed, what did not (OPERATIONS failure 8).

    Any change of degrees or layout is fine: parameters are whole in a checkpoint and the order of
    samples depends on the cursor alone. Another seed would draw another order.

    Args:
        saved: as the checkpoint holds them.
        now: those of the run that resumes it, at the same step.
        cursor: samples drawn so far, over all ranks.
        changing: accept another global batch, length or seed.

    Raises:
        GeometryError: global batch, length or seed differ and `changing` is false.
    """
    fixed = [
        f"{name} {getattr(saved, key)} -> {getattr(now, key)}"
        for name, key in (
            ("global batch", "batch"),
            ("sequence length", "length"),
            ("seed", "seed"),
        )
        if getattr(saved, key) != getattr(now, key)
    ]
    if fixed and not changing:
        raise GeometryError(
            "the run that resumes would see other batches than the one it continues",
            ", ".join(fixed),
            "use the curriculum, accumulation and seed of the checkpoint, or another run name",
        )
    parts = [_change("ranks", saved.ranks, now.ranks)]
    parts += [
        _change(key, getattr(saved, key), getattr(now, key))
        for key in ("data", "ring", "ulysses")
        if getattr(saved, key) != getattr(now, key)
    ]
    if saved.layout != now.layout:
        parts.append(f"layout {saved.layout}->{now.layout}")
    parts += fixed or [f"global batch unchanged {now.batch}"]
    parts.append(f"data cursor {cursor} samples")
    return "resumed " + ", ".join(parts)


def _change(name: str, old: int, new: int) -> str:
    if name == "ranks":
        return f"{old}->{new} ranks" if old != new else f"on {new} ranks"
    return f"{name} {old}->{new}"
