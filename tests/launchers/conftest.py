"""Launches of small scripts in place of training: the launcher itself is what is tested."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.launchers.slurm_cluster import SlurmCluster

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATHS = ":".join(str(ROOT / folder) for folder in (".", "kernels", "launchers"))

# What a rank does. `run` is the folder of the run, `record` where it leaves why it failed.
PRELUDE = """
import ctypes, json, os, pathlib, signal, subprocess, sys, time
from xdist_launchers.failure import failure_of, write_failure
run, record = pathlib.Path(sys.argv[1]), sys.argv[-1]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
(run / f"pid-{rank}").write_text(str(os.getpid()))
def fail(error):
    write_failure(failure_of(error, rank), record)
    sys.stdout.flush()
    os._exit(failure_of(error, rank).exit_code)
def wait_for(name):
    while not (run / name).exists():
        time.sleep(0.01)
"""

# Starts a job whose ranks run PRELUDE and the body that follows it.
LAUNCH = """
import json, pathlib, sys
from xdist_launchers import local
from xdist_launchers.job import Job
local.PEER_GRACE_S = 1.0  # these ranks never need the three seconds
body, run, *numbers = sys.argv[1:]
ranks, restarts, init_timeout_s, stop_timeout_s = map(int, numbers)
command = (sys.executable, "-c", body, run)
job = Job(
    command, ranks, 1, pathlib.Path(run), restarts, init_timeout_s, "xdist again", stop_timeout_s
)
sys.exit(local.run(job))
"""


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Poll until `true()`; fails the test after `seconds`."""
    stop_at = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < stop_at, "waited in vain"
        time.sleep(0.02)


@dataclass
class Launch:
    """A launcher process and the folder of its run."""

    process: subprocess.Popen[str]
    run: pathlib.Path

    def end(self, seconds: float = 60.0) -> tuple[int, str]:
        """Wait for the launcher; its exit code and all it printed."""
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out

    def pids(self, count: int) -> list[int]:
        """Process ids of all ranks, once they have started."""
        files = [self.run / f"pid-{rank}" for rank in range(count)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    def status(self) -> dict[str, object]:
        """status.json."""
        return json.loads((self.run / "status.json").read_text())


@pytest.fixture
def launch(tmp_path: pathlib.Path) -> Iterator[Callable[..., Launch]]:
    """Start `body` on some ranks under the local launcher; all is killed after the test."""
    started: list[Launch] = []

    def start(
        body: str,
        ranks: int = 2,
        restarts: int = 0,
        init_timeout_s: int = 60,
        stop_timeout_s: int = 60,
    ) -> Launch:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        numbers = map(str, (ranks, restarts, init_timeout_s, stop_timeout_s))
        arguments = [PRELUDE + body, str(run), *numbers]
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        started.append(Launch(process, run))
        return started[-1]

    yield start
    for item in started:
        if item.process.poll() is None:
            os.killpg(item.process.pid, signal.SIGKILL)
        item.process.communicate()


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A private Slurm of two nodes with 8 CPUs each, for the session; tests cancel their jobs."""
    with SlurmCluster() as cluster:
        yield cluster
