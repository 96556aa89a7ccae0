"""A rank stopped under the commands that users start: everybody ends, and the message says why."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.end_to_end.killed_command import MARK, marked
from tests.end_to_end.training import TEXT, config_of, lines_of, make_store, status_of
from tests.launchers.conftest import PATHS, alive, wait_until
from xdist.config import Config

HOST = os.uname().nodename
LIMIT_S = 8
SETTINGS = (
    "parallel.ulysses=2",
    "launch.ranks=2",
    "train.curriculum=[{length=61,batch=2,steps=4000}]",
    "checkpoint.every_steps=20",
    f"train.step_timeout_s={LIMIT_S}",
)
STARTERS = {
    "local": ["-P", "-m", "xdist_launchers.cli", "launch", "local"],
    "torchrun": [
        *("-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "xdist_launchers.cli", "train"),
    ],
}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it printed, seconds from the stop of rank 1 to the
    end of rank 0."""

    code: int
    said: str
    seconds: float
    config: Config


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Both commands side by side: most of their time they wait."""
    folders = [tmp_path_factory.mktemp(starter) for starter in STARTERS]
    with ThreadPoolExecutor(len(STARTERS)) as threads:
        return dict(zip(STARTERS, threads.map(_hang, STARTERS, folders), strict=True))


def _hang(starter: str, folder: pathlib.Path) -> Ended:
    """Start the command, stop rank 1 from outside, and wait for the end."""
    make_store(folder)
    (folder / "tiny.toml").write_text(TEXT)
    config = config_of(folder, "hung", *SETTINGS)
    where = [f"run.directory={folder / 'runs'}", "run.name=hung"]
    words = [str(folder / "tiny.toml"), *where, f"data.store={folder / 'store.zarr'}"]
    mark = uuid.uuid4().hex
    env = os.environ | {"PYTHONPATH": PATHS, MARK: mark, "OMP_NUM_THREADS": "1"}
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *STARTERS[starter], *words, *SETTINGS], env=env, stdout=out, stderr=out
        )
    metrics = config.run_directory / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and len(lines_of(config)) > 30, 150)
        ranks = {rank: pid for pid, rank in marked(mark).items() if rank is not None}
        os.kill(ranks[1], signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: not alive(ranks[0]), 120)
        seconds = time.monotonic() - stopped
        process.wait(timeout=90)
        wait_until(lambda: not marked(mark), 30)
    finally:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    said = (folder / "out").read_text(errors="replace")
    return Ended(process.returncode, said, seconds, config)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("starter", sorted(STARTERS))
def test_a_stopped_rank_ends_the_command(ended: dict[str, Ended], starter: str) -> None:
    """Rank 1 gets SIGSTOP from outside; under plain torchrun nobody but the ranks watches."""
    one = ended[starter]
    # The limit, then at most 10 s for the verdict; half of it again for a busy machine.
    assert one.seconds < LIMIT_S + 15
    assert one.code == (7 if starter == "local" else 1), one.said
    hangs = rf"rank 1 on {HOST} hangs: in \w+ of \w[\w ]* \d+ since \d+ s"
    assert re.search(hangs, one.said), one.said
    assert "was stopped by a signal (SIGSTOP)" in one.said
    status = status_of(one.config)
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert (status["rank"], status["host"]) == (1, HOST)
    stacks = one.config.run_directory / "logs" / "rank-0.stacks.txt"
    assert "xdist/train/loop.py" in stacks.read_text()
