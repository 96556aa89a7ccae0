"""Keeping what an exchange delivered, so that a recompute does not send again.

Inside `recording()` every exchange's received tensors go on a tape; inside `replaying(tape)` the
same exchanges, in the same order, take them from it and nothing travels. Tapes nest: an exchange
goes on all that record, also one whose data come from a tape. Whether a layer keeps or sends again
is the caller's policy (memory/checkpoint.py keeps); the bytes kept are those received.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xdist.errors import ConfigError

Specs = Mapping[int, tuple[tuple[int, ...], torch.dtype]]  # of what arrives, by rank


@dataclass(frozen=True)
class Kept:
    """One exchange: what was to arrive, and it once it has."""

    move: str
    specs: Specs
    tensors: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Tape:
    """The exchanges of one forward pass, in the order they were started."""

    exchanges: list[Kept] = field(default_factory=list)
    next: int = 0

    def take(self, move: str, specs: Specs) -> dict[int, Tensor]:
        """What the next exchange received when it was recorded.

        Raises:
            ConfigError: it was another one.
        """
        kept = self.exchanges[self.next] if self.next < len(self.exchanges) else None
        if kept is None or kept.move != move or _plain(kept.specs) != _plain(specs):
            was = "none" if kept is None else _said(kept.move, kept.specs)
            raise ConfigError(
                "a recompute starts another exchange than its forward did",
                f"exchange {self.next} is {_said(move, specs)}; in the forward it was {was}",
                "make the layer's exchanges the same, in the same order, with and without "
                "gradients and at each call, or leave the layer out of the checkpoint",
            )
        self.next += 1
        return kept.tensors

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(t.nbytes for kept in self.exchanges for t in kept.tensors.values())


class _Mode(threading.local):
    recording: tuple[Tape, ...] = ()
    replaying: Tape | None = None


_mode = _Mode()


def reserve(move: str, specs: Specs) -> dict[int, Tensor] | None:
    """A place on every tape that records for an exchange that is starting, None without any; its
    tensors are put in when they arrive."""
    if not _mode.recording:
        return None
    kept = Kept(move, specs)
    for tape in _mode.recording:
        tape.exchanges.append(kept)
    return kept.tensors


def replayed() -> Tape | None:
    """The tape exchanges are to be read from, if any."""
    return _mode.replaying


def on_tape() -> bool:
    """Whether exchanges are recorded or replayed: their order must then not depend on whether
    gradients are wanted, since a forward is recorded without and replayed with them."""
    return bool(_mode.recording) or _mode.replaying is not None


@contextmanager
def recording() -> Iterator[Tape]:
    """Keep what the exchanges started inside receive."""
    before, tape = _mode.recording, Tape()
    _mode.recording = (*before, tape)
    try:
        yield tape
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


def _plain(specs: Specs) -> dict[int, tuple[tuple[int, ...], torch.dtype]]:
    return {rank: (tuple(shape), dtype) for rank, (shape, dtype) in specs.items()}


def _said(move: str, specs: Specs) -> str:
    parts = [f"{tuple(shape)} of {dtype} from {rank}" for rank, (shape, dtype) in specs.items()]
    return f"{move} ({', '.join(parts) or 'nothing arrives'})"
