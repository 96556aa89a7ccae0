"""Runs a command's rows in a process that may be lost, and ends in time whatever a row does.

A row can hang, or end its process (a fault inside a kernel, a package built for another torch).
So a worker makes the rows and says which one it begins; this process, which imports no torch,

    a row takes too long          ends the worker, records the row and where it stood
    the worker ends in a row      records the row with the signal or the last line of its errors
    the command's time is up      ends the worker; its row is left for the next call

and starts a fresh worker, which goes on with the next row from the JSON on disk. A row recorded so
is tried once more by the next call of the command, and then kept.

    0 s ... until                 rows begin
    until ... + cut_s             the row in progress may end
    ... + end_s                   a last worker computes ratios and writes the page
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gpu_rows

_PR_SET_PDEATHSIG = 1
_DUMP = signal.SIGUSR1
_CUT = "the command's time was up"
# For a worker that came to its end to leave.
_LEAVE_S = 10.0
# Workers in a row that make nothing, before the command gives up.
_IDLE = 2


class Limits(NamedTuple):
    """Seconds. row_s: of a row; idle_s: between two rows, and of a worker's start; cut_s and end_s:
    after the time in which rows begin. With 8 minutes for those, a command ends within 9."""

    row_s: float = gpu_rows.ROW_SECONDS
    idle_s: float = 100.0
    cut_s: float = 20.0
    end_s: float = 45.0


def command(
    name: str,
    file: str,
    about: str | None,
    argv: Sequence[str] | None,
    rows: Callable[[gpu_rows.Options], int],
) -> int:
    """The whole of a command: `rows` in a worker, watched by this process.

    0: nothing failed (rows may be left, the last line says how many), or no card; 1: a row failed;
    2: the command broke off outside of its rows.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = gpu_rows.options(about, argv)
    if given.run:
        _be_watched()
    if why := gpu_rows.no_card(name, given.device):
        print(why)
        return 0
    if given.run:
        return rows(given)
    return supervise(name, file, argv, given, Limits(row_s=given.row_s))


def _be_watched() -> None:
    """Of a worker: it ends with the process that watches it, and can be asked where it stands."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    faulthandler.enable(all_threads=False)
    faulthandler.register(_DUMP, all_threads=False)


def supervise(
    name: str, file: str, argv: Sequence[str], given: gpu_rows.Options, limits: Limits
) -> int:
    """Starts workers until one comes to the end; the exit code of the command."""
    run = datetime.datetime.now(datetime.UTC).isoformat()
    arguments = [file, *argv, "--run", run, "--until", str(given.until)]
    path: Path | None = None
    code, idle, broken = 2, 0, ""
    with _ended_by_sigterm():
        while idle < _IDLE and time.time() < given.until + limits.end_s:
            worker = Worker(arguments, given.device, limits)
            try:
                why = worker.watch(given.until + limits.cut_s, given.until + limits.end_s)
            finally:
                gone = worker.end()
            path = worker.table or path
            if worker.finished is not None:
                code, broken = worker.finished, ""
                break
            why = why or worker.last_words()
            if worker.row is not None and why != _CUT:
                _record(worker, why)
            elif not worker.anew:
                broken = why if why == _CUT else f"the worker ended outside of a row: {why}"
            idle = idle + 1 if worker.row is None and not worker.made else 0
            if not gone:
                broken = "a worker cannot be ended: the card does not answer"
                break
    if path is None:
        print(f"{name}: nothing measured; {broken}", flush=True)
        return 2
    said = f"; BROKE OFF: {broken or 'no worker came to the end in time'}" if code == 2 else ""
    print(f"{name}: {gpu_rows.summary(path, run)}{said}", flush=True)
    return code


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM (of `timeout`, of a lease) ends the worker too, with all that it started."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _record(worker: Worker, why: str) -> None:
    """Adds the row in progress to the JSON, with what ended it."""
    assert worker.row is not None
    assert worker.table is not None
    row = {**worker.row, "remark": why.replace("|", "/")[:300], "ended": True}
    # What ends a rival is a finding; what ends our kernels is a fault.
    row |= {} if worker.theirs else {"failed": True}
    whole = json.loads(worker.table.read_text("utf-8"))
    whole["rows"].append(row)
    gpu_rows.put(worker.table, json.dumps(whole, indent=1) + "\n")
    print(f"{row['group']}: {row['case']}: {row['remark']}", flush=True)


@dataclass
class _Pipe:
    """The reading end of a pipe, and what came without an end of line."""

    file: int
    rest: bytes = b""

    def lines(self) -> list[bytes] | None:
        """The lines that came; None at its end."""
        data = os.read(self.file, 1 << 16)
        if not data:
            return None
        *found, self.rest = (self.rest + data).split(b"\n")
        return found


class Worker:
    """A process that makes rows. table: its JSON; row: that in progress; made: rows it ended;
    finished: the exit code it came to; anew: whether its last row told it to end."""

    def __init__(self, arguments: Sequence[str], device: str, limits: Limits) -> None:
        self.limits = limits
        self.table: Path | None = None
        self.row: dict[str, Any] | None = None
        self.theirs = False
        self.made = 0
        self.finished: int | None = None
        self.errors: deque[str] = deque(maxlen=60)
        told, tell = os.pipe()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if device == "cuda":
            # On a card kernels are compiled, whatever tests set before.
            environment.pop("TRITON_INTERPRET", None)
        sys.stdout.flush()
        # A session of its own: what it starts can be ended with it.
        self.process = subprocess.Popen(
            [sys.executable, *arguments, "--tell", str(tell)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[tell],
            env=environment,
            start_new_session=True,
        )
        os.close(tell)
        assert self.process.stderr is not None
        self.told, self.said = _Pipe(told), _Pipe(self.process.stderr.fileno())
        self.selector = selectors.DefaultSelector()
        for pipe, read in ((self.told, self._told), (self.said, self._said)):
            self.selector.register(pipe.file, selectors.EVENT_READ, (pipe, read))
        self.since = time.time()

    @property
    def anew(self) -> bool:
        return self.process.returncode == gpu_rows.ANEW

    def watch(self, cut_at: float, end_at: float) -> str:
        """Until it ends ("") or may not go on: why."""
        while True:
            in_row = self.row is not None
            limit = self.limits.row_s if in_row else self.limits.idle_s
            # Whatever keeps it after its last word, nothing is lost with it.
            limit = limit if self.finished is None else _LEAVE_S
            stop_at = min(self.since + limit, cut_at if in_row else end_at)
            left = stop_at - time.time()
            if left <= 0:
                own = stop_at == self.since + limit
                return f"no end after {limit:g} s{self._where()}" if own else _CUT
            self._read(min(left, 0.5))
            if self.process.poll() is not None:
                while self._read(0.0):
                    pass
                return ""

    def _read(self, timeout_s: float) -> bool:
        """Takes in what it says; whether anything came."""
        came = False
        for key, _ in self.selector.select(timeout_s):
            pipe, read = key.data
            lines = pipe.lines()
            if lines is None:
                self.selector.unregister(pipe.file)
                continue
            came = True
            for line in lines:
                read(line)
        return came

    def _told(self, line: bytes) -> None:
        what = json.loads(line)
        self.since = time.time()
        if "table" in what:
            self.table = Path(what["table"])
        elif "begin" in what:
            self.row, self.theirs = what["begin"], what["theirs"]
        elif "end" in what:
            self.row = None
            self.made += 1
        else:
            self.finished = what["finished"]

    def _said(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self.errors.append(text)
        print(text, file=sys.stderr, flush=True)

    def _where(self) -> str:
        """Where it stands, asked for; "" where it does not answer."""
        self.errors.clear()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(_DUMP)
        until = time.time() + 1.0
        while time.time() < until and not _frame(self.errors):
            self._read(0.1)
        return _frame(self.errors)

    def last_words(self) -> str:
        """What ended it: the signal or the code, and where or with which message."""
        code = self.process.returncode
        if code is None:
            return "it did not end"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}{_frame(self.errors)}"
        last = next((line.strip() for line in reversed(self.errors) if line.strip()), "no message")
        return f"ended with code {code}: {last}"

    def end(self) -> bool:
        """Ends it with all that it started; whether it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.selector.close()
            os.close(self.told.file)
            assert self.process.stderr is not None
            self.process.stderr.close()
        return True


def _frame(errors: Sequence[str]) -> str:
    """Where the stack that faulthandler wrote has its innermost line; "" without one."""
    at = [number for number, line in enumerate(errors) if "most recent call first" in line]
    for line in list(errors)[at[-1] + 1 :] if at else ():
        if found := re.search(r'File "([^"]+)", line (\d+) in (.+)', line):
            return f" at {Path(found[1]).name}:{found[2]}, in {found[3].strip()}"
    return ""
