"""One task of a Slurm step: starts its rank, and stays a little longer than it.

srun ends a whole step when one task fails. The task waits first, so that the other ranks notice by
themselves and say what they were doing, and it turns a signal that killed its rank into a record
and an exit code. Slurm signals every process of a step, so signals are not handed on.
"""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import time
from collections.abc import Sequence

from xdist.config import Config, load
from xdist_launchers import slurm_env
from xdist_launchers.doctor import memory_bytes
from xdist_launchers.failure import Failure, write_failure
from xdist_launchers.job import error_file, program
from xdist_launchers.processes import Child, rss_bytes

GRACE_S = 8.0  # for the others to end by themselves; xdist promises that they do within 10 s
OOM_SHARE = 0.9  # of the host's memory, from which SIGKILL is taken for the OOM killer's
LOST = 7


def ended_file(directory: pathlib.Path, rank: int) -> pathlib.Path:
    """Where a task leaves the exit code of its rank, e.g. logs/rank-1.ended."""
    return directory / "logs" / f"rank-{rank}.ended"


def run_task(path: str, overrides: Sequence[str]) -> int:
    """Run the rank that Slurm's variables name; returns its exit code, 7 if a signal killed it.

    Rank 0 prints into the job's log, the others into logs/rank-N.log of the run.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = load(path, overrides)
    mine = slurm_env.rank_variables(
        os.environ, threads=config.run.threads, interface=config.slurm.interface
    )
    rank, world = int(mine["RANK"]), int(mine["WORLD_SIZE"])
    record = error_file(config.run_directory, rank)
    command = [*program(), "train", path, *overrides, "--error-file", str(record)]
    watch = _Watch(command, os.environ | mine, config, rank)
    code = watch.wait()
    if watch.child.killed_by is not None:
        write_failure(watch.killed(watch.child.killed_by), record)
    elif code not in (0, 75) and not record.exists():
        write_failure(watch.silent(code), record)
    # From here on nothing but SIGKILL may change the code: srun ends the step with the first task.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ended_file(config.run_directory, rank).write_text(f"{code}\n", encoding="ascii")
    until = time.monotonic() + GRACE_S
    others = [ended_file(config.run_directory, other) for other in range(world)]
    while code and time.monotonic() < until and not all(map(pathlib.Path.exists, others)):
        time.sleep(0.1)
    return code


class _Watch:
    """The rank's process, and the memory it and its host had at the last sample."""

    def __init__(
        self, command: Sequence[str], env: dict[str, str], config: Config, rank: int
    ) -> None:
        self.rank, self.host = rank, os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self.memory_share, self.rss = 0.0, 0
        if rank == 0:
            self.child = Child(command, env, None)
            return
        log = config.run_directory / "logs" / f"rank-{rank}.log"
        start = int(env.get("SLURM_RESTART_COUNT", "0")) + 1
        with log.open("ab") as file:
            line = f"== job {env['SLURM_JOB_ID']}, start {start}, rank {rank} on {self.host}\n"
            file.write(line.encode())
            file.flush()
            self.child = Child(command, env, file)

    def wait(self) -> int:
        """The rank's exit code; memory is sampled once a second."""
        sampled = -1e9
        while not self.child.ended:
            if time.monotonic() - sampled >= 1.0:
                sampled = time.monotonic()
                available, total = memory_bytes()
                held = rss_bytes(self.child.pid)
                # A process that has just been killed holds nothing: the sample would blame nobody.
                if held:
                    self.memory_share, self.rss = 1 - available / total, held
            time.sleep(0.05)
        self.child.finish()
        return LOST if self.child.killed_by is not None else self.child.exit_code or 0

    def killed(self, number: int) -> Failure:
        """Failure 12 of the list in docs/failures.md: a signal ended the rank."""
        name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
        why = f"killed by signal {number} ({name})"
        why += f", host memory {self.memory_share:.0%} at last sample"
        if number == signal.SIGKILL and self.memory_share >= OOM_SHARE:
            why += ": likely the OOM killer"
        if number in (signal.SIGUSR1, signal.SIGTERM):
            why += ": asked to stop before it had begun to train"
        why += f"; rank {self.rank} held {self.rss / 2**30:.2f} GiB"
        return self._failure(LOST, "RankKilled", f"rank {self.rank} on {self.host} was killed", why)

    def silent(self, code: int) -> Failure:
        """The rank ended by itself and left no record."""
        what = f"rank {self.rank} on {self.host} ended with exit code {code} and left no reason"
        return self._failure(code, "", what, "")

    def _failure(self, code: int, kind: str, what: str, why: str) -> Failure:
        do = "submit the job again: it resumes from the newest checkpoint, if there is one"
        return Failure(self.rank, self.host, code, kind, what, why, do, "", time.time())
