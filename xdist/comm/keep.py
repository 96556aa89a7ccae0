"""Keeping what an exchange delivered, so that a recompute does not send again.

Inside `recording()` every exchange's received tensors go on a tape; inside `replaying(tape)` the
same exchanges, in the same order, take them from it and nothing travels. Whether a layer keeps or
sends again is the caller's policy (memory/checkpoint.py keeps); the bytes kept are those received.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Tape:
    """Received tensors of the exchanges of one forward pass, in the order they were started."""

    received: list[tuple[str, dict[int, Tensor]]] = field(default_factory=list)
    next: int = 0

    def reserve(self, move: str) -> dict[int, Tensor]:
        """A place for an exchange that is starting; its tensors are put in when they arrive."""
        place: dict[int, Tensor] = {}
        self.received.append((move, place))
        return place

    def take(self, move: str) -> dict[int, Tensor]:
        """What the next exchange received when it was recorded."""
        if self.next == len(self.received) or self.received[self.next][0] != move:
            raise RuntimeError(
                f"a recompute started exchange {self.next} ({move}), which its forward did not"
            )
        self.next += 1
        return self.received[self.next - 1][1]

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(t.nbytes for _, place in self.received for t in place.values())


class _Mode(threading.local):
    recording: Tape | None = None
    replaying: Tape | None = None


_mode = _Mode()


def recorded() -> Tape | None:
    """The tape exchanges are to be written to, if any."""
    return _mode.recording


def replayed() -> Tape | None:
    """The tape exchanges are to be read from, if any."""
    return _mode.replaying


@contextmanager
def recording() -> Iterator[Tape]:
    """Keep what the exchanges started inside receive. Nested: the inner tape alone."""
    before, _mode.recording = _mode.recording, Tape()
    try:
        yield _mode.recording
    finally:
        _mode.recording = before


@contextmanager
def replaying(tape: Tape) -> Iterator[None]:
    """Exchanges started inside take their results from the tape, from its beginning."""
    before, _mode.replaying = _mode.replaying, tape
    tape.next = 0
    try:
        yield
    finally:
        _mode.replaying = before
