"""`xdist launch ray`: one actor a rank in a placement group, watched and restarted by this driver.

The cluster is the one that ray.address names, or a private one that begins and ends with the run.
Checkpoints, status.json and logs are those of every other launcher.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from xdist import console
from xdist.config import Config, load, override
from xdist_launchers.failure import Failure, say
from xdist_launchers.job import Job, local_job
from xdist_launchers.local import port_taken
from xdist_launchers.rank_env import PORT_TRIES
from xdist_launchers.ray_attempt import PREEMPTED, Attempt, Watched, first_failure
from xdist_launchers.ray_cluster import (
    Cluster,
    check_environment,
    connection,
    job_address,
    warn_if_insecure,
)
from xdist_launchers.ray_plan import Need
from xdist_launchers.ray_private import private_cluster
from xdist_launchers.run_state import Progress, replace_status

OOM_SHARE = 0.9  # of the host's memory, from which SIGKILL is taken for the OOM killer's
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def ray_job(path: str, overrides: Sequence[str], *, render: bool = False) -> tuple[Config, Job]:
    """Read and check the config before anything is started; raises ConfigError."""
    job = local_job(path, overrides, render=render, launcher="ray")
    return load(path, overrides) if path else override(Config(), overrides), job


def need_of(config: Config) -> Need:
    """What a config asks of a Ray cluster."""
    ray = config.ray
    return Need(config.ranks, config.parallel.ulysses, ray.cpus_per_rank, ray.gpus_per_rank)


def run(config: Config, job: Job, *, insecure: bool = False) -> int:
    """Start the ranks and wait; returns the exit code of the run, as `xdist launch local` does.

    Raises:
        LaunchError: no cluster, no room in it, or one that must not be used.
    """
    check_environment(config.ray.address, os.environ, insecure=insecure)
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    _note_signals(seen)
    try:
        with _cluster(config, seen, insecure=insecure) as cluster:
            # Ray sets a handler of its own when it connects.
            _note_signals(seen)
            if config.ray.prepare and not seen:
                from xdist_launchers.ray_prepare import prepare

                console.say("\n".join(prepare(cluster, config).lines()), sys.stdout)
            return Driver(cluster, config, job, seen).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note_signals(seen: list[int]) -> None:
    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    for number in _NUMBERS:
        signal.signal(number, note)


@contextlib.contextmanager
def _cluster(config: Config, seen: list[int], *, insecure: bool) -> Iterator[Cluster]:
    address = config.ray.address or job_address(os.environ)
    if address:
        say(f"xdist: uses the Ray cluster at {address}")
        warn_if_insecure(os.environ)
        given = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        if not insecure:
            given["RAY_AUTH_MODE"] = "token"
        with connection(address, given) as cluster:
            yield cluster
        return
    need = need_of(config)
    cpus = max(need.ranks * need.cpus, len(os.sched_getaffinity(0)))
    # A private cluster always has its token, whatever the environment says.
    with (
        private_cluster(cpus, None if need.gpus else 0, lambda: bool(seen)) as (private, env, _),
        connection(private, env) as cluster,
    ):
        yield cluster


class Driver:
    """Attempts, until one ends the run."""

    def __init__(self, cluster: Cluster, config: Config, job: Job, signals: list[int]) -> None:
        self.cluster, self.config, self.job, self.signals = cluster, config, job, signals

    def run(self) -> int:
        """0, 75, the first failing rank's own code, 7 when it was lost, or 128 + a signal."""
        job, restarts, ports = self.job, 0, 1
        while True:
            progress = Progress(job.directory)
            attempt = Attempt(
                self.cluster, job, need_of(self.config), self.config.ray.heartbeat_s, self.signals
            )
            attempt.run()
            codes = attempt.codes()
            if codes == {PREEMPTED}:
                say(f"xdist: stopped and saved; go on with: {job.again}")
                return PREEMPTED
            if self.signals:
                return self._stopped()
            if codes == {0}:
                return 0
            if ports < PORT_TRIES and (taken := port_taken(job)):
                ports += 1
                say(f"{taken}; trying another port ({ports} of {PORT_TRIES})")
                continue
            failure, trace = self._failure(attempt)
            if failure.exit_code == 7 and restarts < job.max_restarts and progress.made():
                restarts += 1
                say(f"{failure.what}; {failure.why}; restart {restarts} of {job.max_restarts}")
                continue
            replace_status(job.directory, failure)
            self._tell(failure, trace)
            return failure.exit_code

    def _failure(self, attempt: Attempt) -> tuple[Failure, str]:
        """Why the attempt failed, and what is worth reading of the rank's output."""
        if not any(rank.failed for rank in attempt.ranks):
            return self._absent(attempt), ""
        rank, record = first_failure(attempt)
        if record is not None:
            return record, record.traceback if record.exit_code == 1 else ""
        if rank.lost or rank.answer.killed_by is not None:
            return self._died(rank), "" if rank.lost else last_words(self.job, rank)
        code = rank.answer.exit_code or 1
        number, host = rank.seat.rank, rank.seat.node.host
        what = f"rank {number} on {host} ended with exit code {code} and left no reason"
        failure = Failure(
            number, host, code, "", what, "", f"run again: {self.job.again}", "", time.time()
        )
        return failure, tail(self.job, rank)

    def _died(self, rank: Watched) -> Failure:
        """Failure 12 of the list in docs/failures.md: a rank or its node is gone."""
        number, host = rank.seat.rank, rank.seat.node.host
        if rank.lost:
            why = rank.lost
        else:
            killer = rank.answer.killed_by or 0
            name = signal.Signals(killer).name if killer in set(signal.Signals) else "unknown"
            share = rank.answer.memory_share
            why = f"killed by signal {killer} ({name}), host memory {share:.0%} at last sample"
            if killer == signal.SIGKILL and share >= OOM_SHARE:
                why += ": likely the OOM killer"
            why += f"; rank {number} held {rank.answer.rss_bytes / 2**30:.2f} GiB"
        progress = Progress(self.job.directory)
        if progress.checkpoint:
            do = f"run again, it resumes from {progress.checkpoint}: {self.job.again}"
        else:
            do = f"run again, from the start for lack of a checkpoint: {self.job.again}"
        what = f"rank {number} on {host} died"
        what += f" after step {progress.step}" if progress.step is not None else ""
        return Failure(number, host, 7, "PeerLost", what, why, do, "", time.time())

    def _absent(self, attempt: Attempt) -> Failure:
        """Failure 4 of the list in docs/failures.md: not all ranks met in time."""
        job = self.job
        missing = [
            rank.seat for rank in attempt.ranks if not job.started_file(rank.seat.rank).exists()
        ]
        names = ", ".join(f"{seat.rank} (host {seat.node.host})" for seat in missing)
        joined = job.ranks - len(missing)
        what = f"{joined} of {job.ranks} ranks joined; missing rank {names}"
        if not missing:
            what = f"all {job.ranks} ranks started, but they did not meet"
        seat = missing[0] if missing else attempt.ranks[0].seat
        why = f"waited launch.init_timeout_s = {job.init_timeout_s:g} s"
        do = "read the log of that rank, or give a slow start more time: launch.init_timeout_s=N"
        return Failure(seat.rank, seat.node.host, 3, "LaunchError", what, why, do, "", time.time())

    def _stopped(self) -> int:
        """The user stopped the run, and the ranks could not save."""
        number, job = self.signals[0], self.job
        what = f"stopped by {signal.Signals(number).name}; all {job.ranks} ranks have ended"
        do = f"go on with: {job.again}"
        code = 128 + number
        failure = Failure(0, socket.gethostname(), code, "", what, "", do, "", time.time())
        job.directory.mkdir(parents=True, exist_ok=True)
        replace_status(job.directory, failure, state="stopped")
        say(failure.message())
        return code

    def _tell(self, failure: Failure, trace: str) -> None:
        """The message, where to read on, and the failing rank's traceback last."""
        details = self.job.error_file(failure.rank)
        if not details.exists():
            details = self.job.log_file(failure.rank)
        say(failure.message(str(details)))
        if trace:
            say(f"rank {failure.rank} said at last:\n{trace.rstrip()}")


def tail(job: Job, rank: Watched, lines: int = 30) -> str:
    """The end of a rank's log."""
    log: pathlib.Path = job.log_file(rank.seat.rank)
    if not log.exists():
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "".join(text.splitlines(keepends=True)[-lines:])


def last_words(job: Job, rank: Watched) -> str:
    """What the interpreter or the C++ runtime said of a crash; "" for a silent death."""
    text = tail(job, rank, 200)
    starts = [text.find(mark) for mark in ("Fatal Python error", "terminate called")]
    return text[min(start) :] if (start := [s for s in starts if s >= 0]) else ""
