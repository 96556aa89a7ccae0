"""Failure 12 with real training: a rank is killed in mid-run, the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launchers.conftest import PATHS, ROOT, alive, wait_until

XDIST = (sys.executable, "-P", "-m", "xdist_launchers.cli")
STEPS = 24


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """A store and a config of many small steps; the run's folder is returned."""
    from xdist.data.prepare import prepare_text

    prepare_text(sorted((ROOT / "xdist").glob("config*.py")), tmp_path / "store.zarr")
    lines = (ROOT / "configs" / "tiny.toml").read_text().splitlines()
    stage = f"curriculum = [{{ length = 128, batch = 1, steps = {STEPS} }}]"
    lines = [stage if line.startswith("curriculum") else line for line in lines]
    (tmp_path / "tiny.toml").write_text("\n".join(lines))
    return tmp_path / "runs" / "tiny"


def _command(run: pathlib.Path, *more: str) -> list[str]:
    folder = run.parent.parent
    return [
        *(*XDIST, "launch", "local", str(folder / "tiny.toml"), "--ranks", "2"),
        f"run.directory={run.parent}",
        f"data.store={folder / 'store.zarr'}",
        "parallel.ulysses=2",
        "checkpoint.every_steps=3",
        *more,
    ]


def _start(run: pathlib.Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(run, *more),
        env=os.environ | {"PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _last_step(run: pathlib.Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if run.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _ranks(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's ranks, by rank."""
    found = {}
    for word in pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with contextlib.suppress(OSError):
            for item in pathlib.Path(f"/proc/{word}/environ").read_bytes().split(b"\0"):
                if item.startswith(b"RANK="):
                    found[int(item[5:])] = int(word)
    return found


def _kill_after(process: subprocess.Popen[str], run: pathlib.Path, rank: int, step: int) -> None:
    """SIGKILL one rank once a step is on record."""
    wait_until(
        lambda: (
            process.poll() is not None
            or ((run / "metrics.jsonl").exists() and _last_step(run) >= step)
        ),
        90,
    )
    ranks = _ranks(process.pid)
    assert set(ranks) == {0, 1}
    os.kill(ranks[rank], signal.SIGKILL)


@pytest.mark.timeout(200)
def test_failure_12_a_killed_rank_ends_with_7_and_the_same_command_goes_on(
    run: pathlib.Path,
) -> None:
    process = _start(run)
    _kill_after(process, run, rank=1, step=5)
    killed_at = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed_at < 10
    assert process.returncode == 7, out
    status = json.loads((run / "status.json").read_text())
    host = os.uname().nodename
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 7, 1)
    assert status["host"] == host
    assert "killed by signal 9 (SIGKILL), host memory" in status["reason"]
    checkpoint = pathlib.Path(status["last_checkpoint"])
    assert (checkpoint / "manifest.json").exists() or any(checkpoint.iterdir())
    message = out[out.index("xdist: rank 1 on ") :].splitlines()
    assert message[0].startswith(f"xdist: rank 1 on {host} died after step ")
    assert re.search(r", in \w+ of (step|save after step|evaluation after step) \d+$", message[0])
    assert "killed by signal 9" in message[1]
    assert f"resumes from {checkpoint}" in message[2]
    assert out.count("xdist: ") == 1
    assert "Traceback" not in out

    again = subprocess.run(
        _command(run),
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" not in line] == list(range(1, STEPS + 1))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lost_rank_is_restarted_and_a_signal_saves_and_ends_with_75(run: pathlib.Path) -> None:
    process = _start(run, "launch.max_restarts=1", "train.curriculum.0.steps=4000")
    _kill_after(process, run, rank=0, step=5)
    before = set(_ranks(process.pid).values())

    def all_new() -> bool:
        now = set(_ranks(process.pid).values())
        return len(now) == 2 and not before & now

    wait_until(all_new, 60)
    began = (run / "metrics.jsonl").stat().st_ino
    wait_until(lambda: (run / "metrics.jsonl").stat().st_ino != began, 60)
    step = _last_step(run)
    wait_until(lambda: _last_step(run) > step, 60)
    ranks = _ranks(process.pid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 75, out
    assert "restart 1 of 1" in out
    assert not any(alive(pid) for pid in ranks.values())
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert status["last_checkpoint"].endswith(f"{status['step']:08d}")
