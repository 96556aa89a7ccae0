"""The watchdog: a thread per rank that ends a run in which a rank hangs, and says which one.

Every second it gives a sign of life into `logs/rank-N.moves`. When a span (a step, an evaluated
sequence, a save) takes longer than allowed, it leaves a note that makes every rank report: what it
is doing and since when, its last moves, the Python stacks of its threads. Ranks then read each
other's reports, agree on the laggard from the same facts (hang.py), tell it, and end with exit
code 7 - from this thread, because one that waits inside a move cannot be raised into.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from xdist.comm.recorder import RECORDER
from xdist.console import on_disk, tell_unwritten
from xdist.errors import PeerLost, XdistError
from xdist.mesh import Mesh
from xdist.train.agree import share_json
from xdist.train.hang import Report, Silent, this_host, verdict
from xdist.train.record import replace

BEAT_S = 1.0
REPORT_S = 4.0  # for all ranks to notice the note and report; a rank that does not is silent
SETTLE_S = 2.0  # for the others to come to their verdict before anybody's connection closes
ASLEEP_S = 5.0  # a beat so late means that this process, or the whole machine, was stopped

OnAbort = Callable[[XdistError], None]


@dataclass(frozen=True)
class Limits:
    """The longest time of a span, seconds: of the first of its kind, and of those after it."""

    first_s: float
    later_s: float


@dataclass
class _Span:
    """What is timed now."""

    kind: str = "set-up"
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    limit_s: float = 0.0


class Watchdog:
    """Watches this rank from `open` to `close`."""

    def __init__(
        self,
        directory: pathlib.Path,
        rank: int,
        limits: Limits,
        *,
        on_abort: OnAbort,
        poll: Callable[[], None],
    ) -> None:
        self._logs = directory / "logs"
        self._rank, self._ranks, self._limits = rank, 1, limits
        self._on_abort, self._poll = on_abort, poll
        self._seen: set[str] = set()
        self._span = _Span(limit_s=limits.first_s)
        self._nonce, self._note = "", pathlib.Path()
        self._host, self._heard = this_host(), 0.0
        self._ended = threading.Event()
        self._stacks: Any = None
        self._thread = threading.Thread(target=self._watch, name="xdist-watchdog", daemon=True)
        self.firing = False

    def open(self, mesh: Mesh) -> str:
        """Start watching; every rank calls it. Returns a line to print, "" where all is well."""
        self._ranks = mesh.world_size
        self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._nonce = str(share_json(os.urandom(8).hex(), mesh))
        self._note = self._logs / f"hang-{self._nonce}"
        if self._rank == 0:
            for old in self._logs.glob("hang-*"):
                old.unlink(missing_ok=True)
        for name in ("hang.json", "hang.told", "stacks.txt"):
            self._file(self._rank, name).unlink(missing_ok=True)
        said = ""
        try:
            RECORDER.open_file(self._file(self._rank, "moves"))
        except OSError as error:
            said = f"the last moves of a killed rank will not be known: {error}"
        self._beat()
        self._span.began = time.monotonic()
        self._thread.start()
        return said

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        RECORDER.close_file()
        RECORDER.head = ""
        if self._stacks is not None:
            self._stacks.close()

    def span(self, kind: str, step: int) -> None:
        """A span begins: its time starts at zero. `step` counts from 1."""
        limit = self._limits.later_s if kind in self._seen else self._limits.first_s
        self._seen.add(kind)
        self._span = _Span(kind, step, limit_s=limit)
        self._say()

    def last_seen(self, rank: int) -> str:
        """What a lost rank of this start did last, "" where that is not known."""
        if not self._nonce:
            return ""
        seen = self._silent(rank)
        return f"rank {rank} was {seen.last}" if seen.host else ""

    def hold_if_firing(self) -> None:
        """Block where a verdict is under way: this thread's own error is only a consequence."""
        if self._nonce and (self.firing or os.path.exists(self._note)):
            time.sleep(REPORT_S + SETTLE_S + 2 * BEAT_S + 5.0)

    def _file(self, rank: int, name: str) -> pathlib.Path:
        return self._logs / f"rank-{rank}.{name}"

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(BEAT_S):
            now = time.monotonic()
            if now - before > BEAT_S + ASLEEP_S:
                # Ctrl-Z, a laptop's lid: the time this process could not work does not count.
                self._span.began += now - before - BEAT_S
            before = now
            self._poll()
            self._beat()
            span = self._span
            late = now - span.began > span.limit_s
            # os.path.exists: on a file server that is gone Path.exists raises.
            if late or os.path.exists(self._note):
                self._fire(span, late)

    def _beat(self) -> None:
        span = self._span
        self._heard = time.time()
        self._say()
        RECORDER.beat()
        left = span.began + span.limit_s - time.monotonic()
        self._arm(min(left, self._limits.later_s) + BEAT_S + 0.5)

    def _say(self) -> None:
        who = f"{self._nonce} {self._heard:.1f} {self._host} {os.getpid()}"
        RECORDER.say(f"{who} {self._span.kind} {self._span.step}:")

    def _arm(self, seconds: float) -> None:
        """Have the stacks written even if some call never lets go of Python's lock."""
        if self._stacks is None:
            path = self._file(self._rank, "stacks.txt")
            self._stacks = path.open("w", encoding="utf-8")
            path.chmod(0o600)
        faulthandler.dump_traceback_later(max(seconds, 0.1), file=self._stacks)

    def _fire(self, span: _Span, late: bool) -> NoReturn:
        """Report, read the reports of the others, tell the verdict, end this process.

        It ends whatever fails on the way: a run folder that cannot be written any more too.
        """
        self.firing = True
        code = PeerLost.exit_code
        try:
            error = self._verdict(span, late)
            code = error.exit_code
            self._tell(error)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _verdict(self, span: _Span, late: bool) -> XdistError:
        limit = "train.first_step_timeout_s" if span.limit_s == self._limits.first_s else ""
        limit = limit or "train.step_timeout_s"
        why = f"{span.kind} {span.step} took longer than {limit} = {span.limit_s:g} s"
        if late:
            with on_disk(str(self._note)):
                replace(self._note, why, tag=str(self._rank), durable=False)
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        mine = Report.now(self._rank, self._host, self._nonce, span.kind, span.step)
        doubt = self._publish(mine)
        reports = self._reports(mine)
        error = verdict(reports, self._silent, self._ranks, self._why(why), self._logs)
        error.why += doubt
        # Ranks that read the same reports say the same: the first of them is heard.
        error.agreed = self._rank != min(reports)  # type: ignore[attr-defined]
        error.verdict = True  # type: ignore[attr-defined]
        return error

    def _publish(self, mine: Report) -> str:
        """Let the other ranks read this one's report; what to add to the verdict."""
        path = self._file(self._rank, "hang.json")
        try:
            replace(path, json.dumps(mine.fields()), tag=str(self._rank), durable=False)
        except OSError as error:
            tell_unwritten(str(path), error)
            return (
                f"; the report of rank {self._rank} could not be written ({error}): that another "
                "rank is silent may mean no more than that"
            )
        return ""

    def _why(self, mine: str) -> str:
        try:
            return self._note.read_text(encoding="utf-8") or mine
        except OSError:
            return mine

    def _reports(self, mine: Report) -> dict[int, Report]:
        """The reports that came in time, and this rank's own."""
        found = {self._rank: mine}
        until = time.monotonic() + REPORT_S
        while len(found) < self._ranks and time.monotonic() < until:
            for rank in range(self._ranks):
                if rank not in found and (report := self._report(rank)) is not None:
                    found[rank] = report
            time.sleep(0.05)
        return found

    def _report(self, rank: int) -> Report | None:
        try:
            fields = json.loads(self._file(rank, "hang.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        report = Report.from_fields(fields)
        return report if report.nonce == self._nonce else None

    def _silent(self, rank: int) -> Silent:
        return Silent.read(rank, self._file(rank, "moves"), self._nonce)

    def _tell(self, error: XdistError) -> None:
        """Record the verdict, and stay until the other ranks have come to theirs."""
        try:
            self._on_abort(error)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # its reader has left
                    stream.flush()
            told = self._file(self._rank, "hang.told")
            with on_disk(str(told)):
                told.touch()
        finally:
            until = time.monotonic() + SETTLE_S
            others = [r for r in range(self._ranks) if self._report(r) is not None]
            files = [self._file(r, "hang.told") for r in others]
            while time.monotonic() < until and not all(map(os.path.exists, files)):
                time.sleep(0.05)
