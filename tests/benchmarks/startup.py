"""What one waits for before anything happens: imports, quick commands, and the first step.

The first step is waited for from the start of the command until its line is in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPEATS = 7
TRAINED = 3  # repeats of what trains
XDIST = (sys.executable, "-P", "-m", "xdist_launchers.cli")
CONFIG = "configs/quickstart.toml"
PATIENCE_S = 120.0


def run(root: Path) -> list[dict[str, Any]]:
    """Median wall time of each command, interleaved."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import torch, xdist": ["-c", "import torch, xdist"],
        "import torch, and every public name of xdist": [
            "-c",
            "import torch, xdist\nfor name in xdist._HOME: getattr(xdist, name)",
        ],
        "xdist show": ["-m", "xdist_launchers.cli", "show", CONFIG],
        "xdist doctor": ["-m", "xdist_launchers.cli", "doctor"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(REPEATS):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments], cwd=root, check=True, stdout=subprocess.DEVNULL
            )
            seconds[name].append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder, _slurm(root) as submit:
        for number in range(TRAINED):
            for name, start_run in _trainings(root, submit).items():
                runs = Path(folder, str(number))
                seconds.setdefault(name, []).append(_first_step(runs, start_run))
    return [
        {"command": name, "wall (s)": statistics.median(s), "slowest (s)": max(s)}
        for name, s in seconds.items()
    ]


Start = Callable[[list[str]], Callable[[], None]]


def _trainings(root: Path, submit: Start | None) -> dict[str, Start]:
    """Ways to start the quickstart's run; each returns what ends it."""

    def process(*words: str, more: tuple[str, ...] = ()) -> Start:
        def start(settings: list[str]) -> Callable[[], None]:
            command = [*words, CONFIG, *settings, *more]
            child = subprocess.Popen(
                command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

            def end() -> None:
                child.send_signal(signal.SIGTERM)
                child.wait()

            return end

        return start

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python")
    found = {
        "first step: xdist train, 1 rank": process(
            *XDIST, "train", more=("launch.ranks=1", "parallel.ulysses=1")
        ),
        "first step: xdist launch local, 2 ranks": process(*XDIST, "launch", "local"),
        "first step: xdist launch mpi, 2 ranks": process(*XDIST, "launch", "mpi"),
        "first step: torchrun, 2 ranks": process(*torchrun, "--nproc-per-node=2", *XDIST, "train"),
    }
    if submit is not None:
        found["first step: xdist launch slurm, 2 nodes x 2 ranks"] = submit
    return found


def _first_step(runs: Path, start: Start) -> float:
    """Seconds from the start of a command to the first line of metrics.jsonl."""
    name = f"run-{time.monotonic_ns()}"
    metrics = runs / name / "metrics.jsonl"
    began = time.perf_counter()
    end = start([f"run.directory={runs}", f"run.name={name}"])
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if time.perf_counter() - began > PATIENCE_S:
                raise TimeoutError(f"no step within {PATIENCE_S:g} s")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        end()


@contextlib.contextmanager
def _slurm(root: Path) -> Iterator[Start | None]:
    """Submits to a private Slurm of two nodes on this host; None where Slurm is not installed."""
    if shutil.which("slurmctld") is None:
        yield None
        return
    sys.path.insert(0, str(root))
    from tests.launchers.slurm_cluster import SlurmCluster

    with SlurmCluster() as cluster:

        def submit(settings: list[str]) -> Callable[[], None]:
            words = [
                "launch.ranks=4",
                "parallel.ulysses=4",
                "slurm.nodes=2",
                "slurm.gpus_per_task=0",
            ]
            out = cluster.run(
                *(*XDIST, "launch", "slurm", CONFIG, *settings, *words),
                cwd=root,
                env={"PYTHONPATH": os.pathsep.join(map(str, _paths(root)))},
            )
            number = int(out.split(":")[0].removeprefix("job "))
            return lambda: cluster.cancel(number)

        yield submit


def _paths(root: Path) -> list[Path]:
    return [root, root / "kernels", root / "launchers"]
