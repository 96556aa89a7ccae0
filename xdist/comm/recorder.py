"""The last moves of this process and what it is doing, for the message of a hang or a lost rank.

A part of the ledger: process-wide, behind a lock. The newest moves are kept in memory; with
`open_file` a line of each also lies in a mapped file, which can still be read when this process
was killed or stopped in the middle of a move. One move costs a few microseconds.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

KEPT = 64  # moves
LINE_BYTES = 192  # of the file; the first line says what the process is doing

# count (from 1) of the messages from one rank to another in one group, shape, dtype
Message = tuple[int, tuple[int, ...], str]


@dataclass(slots=True)
class Move:
    """One exchange of this process. Messages are by world rank; times are `time.time()`."""

    number: int  # of this process, from 1
    name: str
    where: str  # the phase
    group: str  # its name: several may hold the same ranks
    ranks: tuple[int, ...]  # world ranks of the group
    sends: dict[int, Message]
    receives: dict[int, Message]
    began_s: float
    waits_s: float = 0.0  # 0: started, but nobody waits for it yet
    ended_s: float = 0.0  # 0: under way

    @property
    def is_waited_for(self) -> bool:
        """Whether this process stands still until the move's data are here."""
        return bool(self.waits_s) and not self.ended_s

    @property
    def at(self) -> str:
        """Where it was made, for a message; "" where nobody said."""
        return f" (in {self.where})" if self.where else ""

    def fields(self) -> dict[str, Any]:
        """For a report: JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def line(self) -> str:
        """One line of the file."""
        state = "ended" if self.ended_s else "waits" if self.waits_s else "started"
        at = self.ended_s or self.waits_s or self.began_s
        return f"{self.number} {at:.6f} {state} {self.name} of {self.ranks} in {self.where}"


@dataclass
class _Group:
    """World ranks of a process group, and how many messages went each way."""

    ranks: tuple[int, ...]
    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)


class Recorder:
    """What `start_pairs` and the training loop write, and a watchdog reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moves: deque[Move] = deque(maxlen=KEPT)
        self._groups: WeakKeyDictionary[Any, _Group] = WeakKeyDictionary()
        self._held: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._number = 0
        self._file: mmap.mmap | None = None
        self._path: Path | None = None
        self.phase, self.since_s = "", time.time()
        self.head = ""

    def enter(self, phase: str) -> None:
        """Say what this process does from now on: data, forward, reduce, ..."""
        self.phase, self.since_s = phase, time.time()
        self._write_head()

    def say(self, head: str) -> None:
        """Put `head` in front of the file's first line."""
        self.head = head
        self._write_head()

    def beat(self) -> None:
        """Let readers on other hosts see the file as it is."""
        if self._path is not None:
            # Closing hands everything mapped to a network file system, for readers elsewhere.
            with suppress(OSError), self._path.open("r+b") as file:
                file.write(_padded(self._head_text()))

    def begin(
        self,
        name: str,
        group: Any,
        ranks: Callable[[], Iterable[int]],
        sends: dict[int, tuple[tuple[int, ...], str]],
        receives: dict[int, tuple[tuple[int, ...], str]],
    ) -> tuple[Move, dict[int, int], dict[int, int]]:
        """Note a move about to start; `sends` and `receives` are shape and dtype by group rank,
        `ranks` gives the world ranks of the group.

        Returns the move and a tag for each message, from its place among the messages of the two
        ranks, the move, its size and dtype: messages of calls that differ never meet.
        """
        if group in self._held:
            raise RuntimeError(
                f"{name} was started on a group on which a scan's chain is under way: wait for "
                "that scan first, or start scans together"
            )
        with self._lock:
            known = self._groups.get(group)
            if known is None:
                known = self._groups[group] = _Group(tuple(ranks()))
            self._number += 1
            out = _counted(known.sent, sends)
            into = _counted(known.received, receives)
            world = known.ranks
            move = Move(
                self._number,
                name,
                self.phase,
                str(group.group_name),
                world,
                {world[r]: message for r, message in out.items()},
                {world[r]: message for r, message in into.items()},
                time.time(),
            )
            self._moves.append(move)
        self._write(move)
        return move, _tags(name, out), _tags(name, into)

    def hold(self, group: Any) -> None:
        """Let nobody begin a move in `group` until `release`: one under way has messages to post.

        Messages of two ranks must be posted in one order on both; one in between would hang.
        """
        self._held[group] = True

    def release(self, group: Any) -> None:
        """Moves may begin in `group` again."""
        self._held.pop(group, None)

    def wait(self, move: Move) -> None:
        """This process goes no further until the move has its data."""
        move.waits_s = time.time()
        self._write(move)

    def end(self, move: Move) -> None:
        """The move has all its data."""
        move.ended_s = time.time()
        self._write(move)

    def moves(self) -> list[Move]:
        """The newest moves, oldest first."""
        with self._lock:
            return list(self._moves)

    def open_file(self, path: Path) -> None:
        """Write lines into `path` too, from now on. Raises OSError where it cannot be mapped."""
        path.unlink(missing_ok=True)
        size = LINE_BYTES * (KEPT + 1)
        with path.open("w+b") as file:
            # Written, not only reserved: a page without a block would be a fault when it is used.
            file.write(b" " * size)
            file.flush()
            self._file = mmap.mmap(file.fileno(), size)
        path.chmod(0o600)
        self._path = path
        for line in range(KEPT + 1):
            self._put(line, "")
        self._write_head()

    def close_file(self) -> None:
        """Stop writing into the file; it stays."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = self._path = None

    def _write_head(self) -> None:
        if self._file is not None:
            self._put(0, self._head_text())

    def _head_text(self) -> str:
        return f"{self.since_s:.3f} {self.head} {self.phase}"

    def _write(self, move: Move) -> None:
        if self._file is not None:
            self._put(1 + move.number % KEPT, move.line())

    def _put(self, line: int, text: str) -> None:
        data = _padded(text)
        with self._lock:
            if self._file is not None:
                self._file[line * LINE_BYTES : (line + 1) * LINE_BYTES] = data


def _padded(text: str) -> bytes:
    return text.encode()[: LINE_BYTES - 1].ljust(LINE_BYTES - 1) + b"\n"


def _counted(
    counts: dict[int, int], messages: dict[int, tuple[tuple[int, ...], str]]
) -> dict[int, Message]:
    found = {}
    for rank, (shape, dtype) in messages.items():
        counts[rank] = counts.get(rank, 0) + 1
        found[rank] = (counts[rank], shape, dtype)
    return found


def _tags(name: str, messages: dict[int, Message]) -> dict[int, int]:
    # Of 31 bits: what a message queue of torch takes.
    return {r: zlib.crc32(_key(name, m).encode()) & 0x7FFFFFFF for r, m in messages.items()}


def _key(name: str, message: Message) -> str:
    """What sender and receiver must agree on. A shape may be flattened on the way."""
    count, shape, dtype = message
    return f"{name} {count} {math.prod(shape)} {dtype}"


RECORDER = Recorder()


def read_file(path: Path) -> tuple[str, list[str]]:
    """The first line of a recorder's file, and the lines of its moves, oldest first."""
    head, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    moves = [line.rstrip() for line in lines if line.strip()]
    return head.rstrip(), sorted(moves, key=lambda line: int(line.split(maxsplit=1)[0]))


def mismatch(reports: dict[int, list[Move]]) -> str:
    """How the ranks' moves contradict each other, "" where they do not.

    `reports` holds the newest moves of ranks that wait. A rank that waits for the k-th message of
    another, which sent its k-th with another move, size or dtype, will wait for ever; so will ranks
    that all wait for others that wait too, in other moves.
    """
    alone: dict[int, tuple[Move, int]] = {}
    for rank, moves in sorted(reports.items()):
        waits = next((move for move in moves if move.is_waited_for), None)
        for way in ("receives", "sends") if waits else ():
            for peer, message in sorted(getattr(waits, way).items()):
                if waits is None or peer not in reports:
                    continue
                other = _other_end(reports[peer], rank, waits.group, way, message[0])
                if other is None:
                    alone[rank] = waits, peer
                    continue
                theirs = getattr(other, "sends" if way == "receives" else "receives")[rank]
                if _key(other.name, theirs) != _key(waits.name, message):
                    one, two = (peer, rank) if way == "receives" else (rank, peer)
                    return (
                        f"message {message[0]} from rank {one} to rank {two} is "
                        f"{_words(other.name, theirs)} on rank {peer}{other.at} and "
                        f"{_words(waits.name, message)} on rank {rank}{waits.at}"
                    )
    if not reports or len(alone) < len(reports):
        return ""
    rank, (waits, peer) = min(alone.items(), key=lambda item: item[0])
    message = {**waits.sends, **waits.receives}[peer]
    other = alone[peer][0]
    return (
        f"rank {rank} waits in {_words(waits.name, message)}{waits.at} for rank {peer}, "
        f"which does not make this move: it waits in {other.name}{other.at}"
    )


def _other_end(moves: list[Move], rank: int, group: str, way: str, count: int) -> Move | None:
    """The move of a peer that sends (or receives) its `count`-th message to (from) `rank`."""
    for move in moves:
        messages = move.sends if way == "receives" else move.receives
        if move.group == group and rank in messages and messages[rank][0] == count:
            return move
    return None


def _words(name: str, message: Message) -> str:
    _, shape, dtype = message
    return f"{name} of {list(shape)} {dtype.removeprefix('torch.')}"


def move_from(fields: dict[str, Any]) -> Move:
    """A move from its `fields` after a way through JSON."""

    def messages(value: dict[str, Any]) -> dict[int, Message]:
        return {int(r): (m[0], tuple(m[1]), m[2]) for r, m in value.items()}

    return Move(
        fields["number"],
        fields["name"],
        fields["where"],
        fields["group"],
        tuple(fields["ranks"]),
        messages(fields["sends"]),
        messages(fields["receives"]),
        fields["began_s"],
        fields["waits_s"],
        fields["ended_s"],
    )
