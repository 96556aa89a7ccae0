"""`xdist launch local`: every rank on this host, watched until all have ended.

Rank 0 inherits the terminal; the others print into logs/rank-N.log. The first rank that fails is
the one that is told; ranks that only lost it are consequences. Nothing is left running: ranks are
in groups of their own that are killed at the end, and the kernel kills them if this process dies.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from xdist_launchers.doctor import memory_bytes
from xdist_launchers.failure import Failure, read_failure, say
from xdist_launchers.job import END_S, Job
from xdist_launchers.processes import Child, adopt_orphans, children, kill_orphans, rss_bytes, stop
from xdist_launchers.rank_env import (
    LOOPBACK,
    PORT_TRIES,
    common_env,
    free_port,
    new_nonce,
    rank_env,
    rendezvous_env,
)
from xdist_launchers.run_state import Progress, last_seen, replace_status

PEER_GRACE_S = 3.0  # for the others to notice by themselves, and to say what they were doing
TERM_S = 2.0  # from SIGTERM to SIGKILL
PREEMPTED = 75  # a rank that was asked to stop, and saved
OOM_SHARE = 0.9  # of the host's memory, from which SIGKILL is taken for the OOM killer's


@dataclass
class _Watch:
    """One attempt: the ranks' processes, when each ended, and the last memory sample."""

    ranks: list[Child]
    ended_at: dict[int, float] = field(default_factory=dict)
    memory_share: float = 0.0
    rss: dict[int, int] = field(default_factory=dict)
    sampled_at: float = -1e9

    def look(self) -> None:
        """Note who has ended, and sample memory once a second."""
        now = time.monotonic()
        for rank, child in enumerate(self.ranks):
            if child.ended:
                self.ended_at.setdefault(rank, now)
        # A killed process has freed its memory: a sample after its end would blame nobody.
        if now - self.sampled_at >= 1.0 and (self.sampled_at < 0 or not self.failed()):
            self.sampled_at = now
            available, total = memory_bytes()
            self.memory_share = 1 - available / total
            self.rss = {r: rss_bytes(child.pid) for r, child in enumerate(self.ranks)}

    def failed(self) -> list[int]:
        """Ranks that ended by themselves with anything but success."""
        return [rank for rank in self.ended_at if self.ranks[rank].exit_code != 0]


class _Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 are noted, to be acted on by the loop."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.seen.append(number)

    @contextlib.contextmanager
    def caught(self) -> Iterator[_Signals]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        before = {number: signal.signal(number, self.note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(job: Job) -> int:
    """Start the ranks and wait; returns the exit code of the run.

    0 when all ranks succeeded; the first failing rank's own code; 7 when a signal killed it;
    75 when the ranks were told to stop and saved; 128 + the signal's number when this process was
    told to stop and they could not.
    """
    mine = children()
    adopt_orphans()
    with _Signals().caught() as signals:
        restarts, ports = 0, 1
        while True:
            progress = Progress(job.directory)
            watch = _attempt(job, signals, mine)
            codes = {child.exit_code for child in watch.ranks}
            if codes == {PREEMPTED} and len(watch.ranks) == job.ranks:
                say(f"xdist: stopped and saved; go on with: {job.again}")
                return PREEMPTED
            if signals.seen:
                return _stopped(job, signals.seen[0])
            failed = watch.failed()
            if not failed and len(watch.ended_at) == job.ranks:
                return 0
            failure, trace = _first(job, watch, failed) if failed else (_absent(job, watch), "")
            if ports < PORT_TRIES and (taken := port_taken(job)):
                ports += 1
                say(f"{taken}; trying another port ({ports} of {PORT_TRIES})")
                continue
            if failure.exit_code == 7 and restarts < job.max_restarts and progress.made():
                restarts += 1
                say(f"{failure.what}; restart {restarts} of {job.max_restarts}")
                continue
            replace_status(job.directory, failure)
            _tell(job, failure, trace)
            return failure.exit_code


def port_taken(job: Job) -> str:
    """What rank 0 said when another process had taken its port since it was chosen; else ""."""
    said = read_failure(job.error_file(0))
    return said.what if said is not None and said.kind == "PortError" else ""


def _attempt(job: Job, signals: _Signals, mine: set[int]) -> _Watch:
    """Start all ranks and return when all have ended; those that must be are ended."""
    (job.directory / "logs").mkdir(parents=True, exist_ok=True)
    job.met_file.unlink(missing_ok=True)
    meeting = rendezvous_env(LOOPBACK, free_port(), new_nonce())
    watch = _Watch([])
    try:
        for rank in range(job.ranks):
            job.error_file(rank).unlink(missing_ok=True)
            job.started_file(rank).unlink(missing_ok=True)
            env = os.environ | _env(job, rank) | meeting
            command = [*job.command, str(job.error_file(rank))]
            if rank == 0:
                watch.ranks.append(Child(command, env, None))
            else:
                with job.log_file(rank).open("wb") as log:
                    watch.ranks.append(Child(command, env, log))
        _watch_over(job, watch, signals)
    finally:
        if signals.seen:
            say("xdist: stopping after this step; a second signal stops at once")
        stop(
            watch.ranks,
            term_s=job.stop_timeout_s if signals.seen else TERM_S,
            hurry=lambda: len(signals.seen) > 1 or (bool(signals.seen) and _hopeless(watch)),
            hurry_s=TERM_S,
        )
        kill_orphans(mine)
    return watch


def _watch_over(job: Job, watch: _Watch, signals: _Signals) -> None:
    """Return when all ranks have ended, or when those that run have to be ended."""
    began = time.monotonic()
    met = False
    first_failure = None
    while len(watch.ended_at) < job.ranks and not signals.seen:
        watch.look()
        now = time.monotonic()
        if watch.failed():
            first_failure = first_failure or now
            if now - first_failure > PEER_GRACE_S:
                return
        elif not met:
            met = bool(watch.ended_at) or job.met_file.exists()
            if not met and now - began > job.init_timeout_s:
                return
        time.sleep(0.02)
    watch.look()


def _hopeless(watch: _Watch) -> bool:
    """Whether those that still run will not end by themselves, or not with a save.

    A rank was killed or failed: the others wait for it and will not reach the end of a step. Or
    one ended well, and long ago: all end after the same save.
    """
    watch.look()
    codes = {watch.ranks[rank].exit_code for rank in watch.ended_at}
    first = min(watch.ended_at.values(), default=time.monotonic())
    return not codes <= {0, PREEMPTED} or time.monotonic() - first > END_S


def _absent(job: Job, watch: _Watch) -> Failure:
    """Failure 4 of the list in docs/failures.md: not all ranks met in time."""
    started = [rank for rank in range(job.ranks) if job.started_file(rank).exists()]
    missing = [rank for rank in range(job.ranks) if rank not in started]
    host = socket.gethostname()
    names = ", ".join(map(str, missing))
    if missing:
        what = f"{len(started)} of {job.ranks} ranks joined; missing rank {names} (host {host})"
    else:
        what = f"all {job.ranks} ranks started, but they did not meet (host {host})"
    rank = missing[0] if missing else 0
    why = f"waited launch.init_timeout_s = {job.init_timeout_s:g} s"
    do = "read the log of that rank, or give a slow start more time with launch.init_timeout_s=N"
    return Failure(rank, host, 3, "LaunchError", what, why, do, "", time.time())


def _env(job: Job, rank: int) -> dict[str, str]:
    common = common_env(world_size=job.ranks, local_world_size=job.ranks, threads=job.threads)
    return common | rank_env(rank, rank)


def _first(job: Job, watch: _Watch, failed: list[int]) -> tuple[Failure, str]:
    """The failure that caused the others, and what is worth reading of its output."""

    def order(rank: int) -> tuple[bool, bool, float]:
        record = read_failure(job.error_file(rank))
        # gloo ends a process with SIGABRT when it loses a peer at a bad moment.
        aborted = watch.ranks[rank].killed_by == signal.SIGABRT
        return (record is not None and record.is_consequence, aborted, watch.ended_at[rank])

    rank = min(failed, key=order)
    child = watch.ranks[rank]
    record = read_failure(job.error_file(rank))
    if record is not None:
        return record, record.traceback if record.exit_code == 1 else ""
    log = job.log_file(rank) if rank else None
    if child.killed_by is not None:
        return _killed(job, watch, rank, child.killed_by), _last_words(log)
    host = socket.gethostname()
    what = f"rank {rank} on {host} ended with exit code {child.exit_code} and left no reason"
    code = child.exit_code or 1
    failure = Failure(rank, host, code, "", what, "", f"run again: {job.again}", "", time.time())
    return failure, _tail(log)


def _killed(job: Job, watch: _Watch, rank: int, number: int) -> Failure:
    """Failure 12 of the list in docs/failures.md: a signal ended a rank."""
    host = socket.gethostname()
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    share = f"host memory {watch.memory_share:.0%} at last sample"
    why = f"killed by signal {number} ({name}), {share}"
    if number == signal.SIGKILL and watch.memory_share >= OOM_SHARE:
        why += ": likely the OOM killer"
    why += f"; rank {rank} held {watch.rss.get(rank, 0) / 2**30:.2f} GiB"
    progress = Progress(job.directory)
    if progress.checkpoint:
        do = f"run again, it resumes from {progress.checkpoint}: {job.again}"
    else:
        do = f"run again, from the start for lack of a checkpoint: {job.again}"
    step = progress.step
    what = f"rank {rank} on {host} died" + (f" after step {step}" if step is not None else "")
    doing = last_seen(job.directory, rank, watch.ranks[rank].pid) if watch.ranks else ""
    what += f", {doing}" if doing else ""
    return Failure(rank, host, 7, "PeerLost", what, why, do, "", time.time())


def _tail(log: pathlib.Path | None, lines: int = 30) -> str:
    """The end of a rank's log; rank 0 has none, it printed on the terminal."""
    if log is None or not log.exists():
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "".join(text.splitlines(keepends=True)[-lines:])


def _last_words(log: pathlib.Path | None) -> str:
    """What the interpreter or the C++ runtime said of a crash; "" for a silent death."""
    text = _tail(log, 200)
    starts = [text.find(mark) for mark in ("Fatal Python error", "terminate called")]
    return text[min(start) :] if (start := [s for s in starts if s >= 0]) else ""


def _tell(job: Job, failure: Failure, trace: str) -> None:
    """The message, where to read on, and the failing rank's traceback last."""
    details = job.error_file(failure.rank)
    if not details.exists():
        details = job.log_file(failure.rank) if failure.rank else job.directory / "status.json"
    say(failure.message(str(details)))
    if trace:
        say(f"rank {failure.rank} said at last:\n{trace.rstrip()}")


def _stopped(job: Job, number: int) -> int:
    """The user stopped the run."""
    name = signal.Signals(number).name
    failure = Failure(
        rank=0,
        host=socket.gethostname(),
        exit_code=128 + number,
        kind="",
        what=f"stopped by {name}; all {job.ranks} ranks have ended",
        why="",
        do=f"go on with: {job.again}",
        traceback="",
        time_s=time.time(),
    )
    replace_status(job.directory, failure, state="stopped")
    say(failure.message())
    return failure.exit_code


def script(job: Job) -> str:
    """The same start as a bash script: environment and commands, for reading or for running.

    The port is chosen when the script runs. It waits for all ranks, without the watching above.
    """
    env = common_env(world_size=job.ranks, local_world_size=job.ranks, threads=job.threads)
    env |= {"MASTER_ADDR": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo"}
    pick = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.ranks} rank(s) of xdist on this host",
        "set -euo pipefail",
        "umask 077",
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        f'export MASTER_PORT="$({shlex.quote(sys.executable)} -c {shlex.quote(pick)})"',
        f"mkdir -p {shlex.quote(str(job.directory / 'logs'))}",
    ]
    # The config of a job that has none is the script's first argument.
    words = ['"${1:?give the path of a config}"' if not w else shlex.quote(w) for w in job.command]
    for rank in range(job.ranks):
        assigned = " ".join(f"{name}={value}" for name, value in rank_env(rank, rank).items())
        to_log = f" > {shlex.quote(str(job.log_file(rank)))} 2>&1" if rank else ""
        lines.append(f"{assigned} {' '.join(words[:-1])}{to_log} &")
    lines += ['for pid in $(jobs -p); do wait "$pid"; done', ""]
    return "\n".join(lines)
