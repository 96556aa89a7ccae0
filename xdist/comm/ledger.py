"""The ledger: bytes this process moved, by move.

Bytes count as if each pair of ranks exchanged directly; what a rank keeps for itself is free.
Backward and recomputation count. The ledger is process-wide behind a lock, because CUDA's
backward runs on threads of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes sent to and received from other ranks, and the number of exchanges."""

    sent_bytes: int = 0
    received_bytes: int = 0
    calls: int = 0

    def add(self, sent_bytes: int, received_bytes: int) -> None:
        """Count one exchange."""
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes
        self.calls += 1


@dataclass
class Ledger(Traffic):
    """What moved while a `ledger()` block was open.

    `by_move` splits the totals by the move's name. `control_bytes` (sent: fingerprints, checks,
    barriers) stand apart and are in no other number.
    """

    by_move: dict[str, Traffic] = field(default_factory=dict)
    control_bytes: int = 0

    def count(self, move: str, sent_bytes: int, received_bytes: int) -> None:
        """Count one exchange of `move`."""
        if move == CONTROL:
            self.control_bytes += sent_bytes
            return
        self.add(sent_bytes, received_bytes)
        self.by_move.setdefault(move, Traffic()).add(sent_bytes, received_bytes)


CONTROL = "control"
_lock = threading.Lock()
_open: list[Ledger] = []


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Count what this process moves inside the block. Blocks nest; each counts on its own."""
    mine = Ledger()
    with _lock:
        _open.append(mine)
    try:
        yield mine
    finally:
        with _lock:
            # By identity: two ledgers with equal counts compare equal.
            _open[:] = [other for other in _open if other is not mine]


def record(move: str, sent_bytes: int, received_bytes: int) -> None:
    """Count one exchange in every open ledger."""
    with _lock:
        for one in _open:
            one.count(move, sent_bytes, received_bytes)
