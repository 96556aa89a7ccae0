"""Who holds a run up: a pure function of what the ranks report of themselves."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from xdist.comm.recorder import RECORDER, Move, mismatch, move_from, read_file
from xdist.errors import DesyncError, PeerLost, XdistError

# Code that waits for other ranks: an engine's own collectives do not pass through the recorder.
_WAITS = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")


@dataclass(frozen=True)
class Report:
    """What one rank was doing when a time limit was over. Times are seconds since the epoch."""

    rank: int
    host: str
    nonce: str
    span: str  # step, evaluation, save, set-up
    step: int  # from 1
    phase: str
    since_s: float
    at_s: float
    collective: str  # of torch or DeepSpeed, in which a thread waits; "" for none
    moves: list[Move]

    @classmethod
    def now(cls, rank: int, host: str, nonce: str, span: str, step: int) -> Report:
        """Of this process."""
        phase, since = RECORDER.phase, RECORDER.since_s
        return cls(
            rank, host, nonce, span, step, phase, since, time.time(), _waits(), RECORDER.moves()
        )

    def fields(self) -> dict[str, Any]:
        """JSON."""
        shallow = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return shallow | {"moves": [move.fields() for move in self.moves]}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Report:
        """From JSON."""
        return cls(**(fields | {"moves": [move_from(one) for one in fields["moves"]]}))

    @property
    def waits(self) -> Move | None:
        """The move that this rank waits for."""
        return next((move for move in self.moves if move.is_waited_for), None)

    @property
    def waits_in(self) -> str:
        """The move or collective it waits in, "" when it does something of its own."""
        move = self.waits
        if move is not None:
            return f"{move.name} (move {move.number}, in {move.where})"
        return f"{self.collective} (in {self.phase})" if self.collective else ""

    def does(self) -> str:
        """What it is doing and since when."""
        since = f"since {max(self.at_s - self.since_s, 0):.0f} s"
        return f"in {self.phase} of {self.span} {self.step} {since}"


@dataclass(frozen=True)
class Silent:
    """A rank that did not report: what its last sign of life said."""

    rank: int
    host: str
    state: str  # why it is silent, as far as this host can see
    last: str  # what it was doing

    @classmethod
    def read(cls, rank: int, path: pathlib.Path, nonce: str) -> Silent:
        """From the file of its last moves."""
        try:
            head, moves = read_file(path)
            at, _, phase = head.partition(": ")
            since, seen, beat, host, pid, span = at.split(maxsplit=5)
        except (OSError, ValueError):
            return cls(rank, "", "gives no sign of life", "unknown, it left no record")
        if seen != nonce:
            return cls(rank, "", "gives no sign of life", "unknown, it left no record")
        now = time.time()
        last = f"in {phase} of {span} since {max(now - float(since), 0):.0f} s"
        words = moves[-1].split(maxsplit=4) if moves else []
        if words and words[2] == "waits":
            last += f", waiting in {words[3]} (move {words[0]})"
        state = _state(int(pid)) if host == this_host() else "gives no sign of life"
        return cls(rank, host, f"{state}; last heard {now - float(beat):.0f} s ago", last)


def verdict(
    reports: dict[int, Report],
    silent_of: Callable[[int], Silent],
    ranks: int,
    limit: str,
    logs: pathlib.Path,
) -> XdistError:
    """The error to end with: PeerLost that names the laggard, or DesyncError for moves that differ.

    `limit` says which time limit was over. Equal on all ranks that read the same reports.
    """
    quiet = [silent_of(rank) for rank in range(ranks) if rank not in reports]
    busy = [report for _, report in sorted(reports.items()) if not report.waits_in]
    waits = [report for _, report in sorted(reports.items()) if report.waits_in]
    do = f"Python stacks: {logs}/rank-N.stacks.txt, last moves: {logs}/rank-N.hang.json"
    if quiet:
        one = quiet[0]
        host = one.host or _host_of(one.rank, reports)
        what = f"rank {one.rank} on {host} hangs: {one.last}; it {one.state}"
        others = [*(f"rank {r.rank} {r.does()}" for r in busy), *_waiting(waits)]
        return _lost(what, _joined(others, quiet[1:]), limit, do, one.rank, host)
    differ = mismatch({report.rank: report.moves for report in waits})
    if differ and not busy:
        error = DesyncError(
            "the ranks do not make the same moves: " + differ,
            f"{limit}; {'; '.join(_waiting(waits))}",
            "look for a move that only some ranks make, or make with other shapes (a condition on "
            f"a rank's own data?); {do}",
        )
        error.rank, error.host = waits[0].rank, waits[0].host  # type: ignore[attr-defined]
        return error
    if busy:
        # Of several that are busy, the one that has been at it for longest.
        one_busy = max(busy, key=lambda report: (report.at_s - report.since_s, -report.rank))
        what = f"rank {one_busy.rank} on {one_busy.host} is {one_busy.does()}"
        rest = [f"rank {r.rank} is {r.does()}" for r in busy if r is not one_busy]
        others = [*_waiting(waits), *rest]
        return _lost(what, _joined(others, []), limit, do, one_busy.rank, one_busy.host)
    what = "all ranks wait for each other: a connection is broken or very slow"
    return _lost(what, "; ".join(_waiting(waits)), limit, do, None, "")


def _lost(what: str, others: str, limit: str, do: str, rank: int | None, host: str) -> PeerLost:
    do = f"{do}; a slow step needs a larger train.step_timeout_s, the first one "
    do += "train.first_step_timeout_s; training resumes from the last checkpoint"
    why = "; ".join(part for part in (others, limit) if part)
    return PeerLost(what, why, do, rank=rank, host=host)


def _joined(others: list[str], quiet: list[Silent]) -> str:
    more = [f"rank {one.rank} is silent too: {one.last}" for one in quiet]
    return "; ".join([*more, *others])


def _waiting(reports: list[Report]) -> list[str]:
    """One phrase for all ranks that wait in the same move."""
    by_move: dict[str, list[int]] = {}
    for report in reports:
        by_move.setdefault(report.waits_in, []).append(report.rank)
    return [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} "
        f"wait{'' if len(ranks) > 1 else 's'} in {name}"
        for name, ranks in by_move.items()
    ]


def _host_of(rank: int, reports: dict[int, Report]) -> str:
    hosts = {report.host for report in reports.values()}
    return hosts.pop() if len(hosts) == 1 else "an unknown host"


def _state(pid: int) -> str:
    """What this host's kernel says of a process: stopped, gone, or stuck."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "gives no sign of life"
    state = text.rpartition(")")[2].split()[0]
    if state in "Tt":
        return "was stopped by a signal (SIGSTOP)"
    if state in "ZX":
        return "has ended"
    return "runs, but a call in it does not let go of Python's lock"


def _waits() -> str:
    """The function of a communication library in which a thread of this process waits."""
    for thread, frame in sys._current_frames().items():
        if thread != threading.get_ident() and _is_communication(frame):
            return frame.f_code.co_name
    return ""


def _is_communication(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in _WAITS)


def this_host() -> str:
    """The name of this host, as one word."""
    return socket.gethostname().replace(" ", "-") or "localhost"
