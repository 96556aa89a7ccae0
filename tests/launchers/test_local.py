"""The local launcher: environment, exit codes, who is blamed, and that nothing is left running."""

from __future__ import annotations

import os
import pathlib
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.launchers.conftest import LAUNCH, PATHS, PRELUDE, Launch, alive, wait_until
from xdist.config import Config, override
from xdist_launchers import local
from xdist_launchers.failure import Failure
from xdist_launchers.job import Job, stop_timeout_s
from xdist_launchers.run_state import Progress, replace_status

Start = Callable[..., Launch]


def test_ranks_get_torchruns_variables_and_their_output_goes_where_it_should(
    launch: Start,
) -> None:
    body = """
names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
print({name: os.environ[name] for name in names.split()}, os.getpgid(0) == os.getpid())
"""
    started = launch(body, 3)
    code, out = started.end()
    assert code == 0
    outputs = [out, *((started.run / "logs" / f"rank-{r}.log").read_text() for r in (1, 2))]
    ports = set()
    for rank, text in enumerate(outputs):
        assert f"'RANK': '{rank}', 'WORLD_SIZE': '3', 'LOCAL_RANK': '{rank}'" in text
        assert "'LOCAL_WORLD_SIZE': '3', 'MASTER_ADDR': '127.0.0.1'" in text
        assert "'OMP_NUM_THREADS': '1'} True" in text
        assert text.count("\n") == 1
        ports.add(text.split("'MASTER_PORT': '")[1].split("'")[0])
    assert len(ports) == 1
    assert ports != {"29500"}


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_the_others_and_is_named(launch: Start, victim: int) -> None:
    started = launch("print('up', flush=True)\ntime.sleep(120)\n", 3)
    pids = started.pids(3)
    os.kill(pids[victim], signal.SIGKILL)
    before = time.monotonic()
    code, out = started.end()
    assert time.monotonic() - before < 10
    assert code == 7
    lines = out.strip().splitlines()
    assert lines[-4].startswith(f"xdist: rank {victim} on {os.uname().nodename} died")
    assert "killed by signal 9 (SIGKILL), host memory " in lines[-3]
    assert "% at last sample" in lines[-3]
    assert "xdist again" in lines[-2]
    assert lines[-1].startswith("details: ")
    assert not any(alive(pid) for pid in pids)
    status = started.status()
    assert status["state"] == "failed"
    assert (status["exit_code"], status["rank"]) == (7, victim)
    assert status["host"] == os.uname().nodename
    assert "killed by signal 9" in str(status["reason"])
    assert set(status) >= {"step", "last_checkpoint"}


def test_a_segfault_is_a_lost_rank_with_its_last_words(launch: Start) -> None:
    body = """
import faulthandler
faulthandler.enable()
if rank == 1:
    ctypes.string_at(0)
time.sleep(120)
"""
    code, out = launch(body).end()
    assert code == 7
    assert "killed by signal 11 (SIGSEGV)" in out
    assert "Fatal Python error: Segmentation fault" in out
    assert "OOM" not in out


def test_the_first_failing_rank_is_told_and_its_traceback_is_last(launch: Start) -> None:
    body = """
from xdist.errors import PeerLost
def broken():
    raise ValueError("the cause")
try:
    if rank == 2:
        wait_for("told")
        broken()
    if rank == 1:
        (run / "told").touch()
        time.sleep(0.3)
        raise PeerLost("lost rank 2 in scan", "connection closed", "look at rank 2", rank=2)
    time.sleep(120)
except Exception as error:
    fail(error)
"""
    started = launch(body, 3)
    code, out = started.end()
    assert code == 1
    assert "xdist: rank 2 failed with ValueError: the cause" in out
    assert out.rstrip().endswith("ValueError: the cause")
    assert out.count("Traceback") == 1
    assert "in broken" in out
    assert "lost rank 2" not in out
    assert str(started.run / "logs" / "rank-2.error.json") in out


def test_a_peer_that_notices_first_is_not_blamed(launch: Start) -> None:
    body = """
from xdist.errors import PeerLost
if rank == 0:
    wait_for("noticed")
    os.kill(os.getpid(), signal.SIGKILL)
(run / "noticed").touch()
fail(PeerLost("lost rank 0 in ring", rank=0))
"""
    code, out = launch(body).end()
    assert code == 7
    assert "xdist: rank 0 on " in out
    assert "lost rank 0 in ring" not in out


def test_an_error_of_ours_is_three_lines_once_with_its_exit_code(launch: Start) -> None:
    body = """
from xdist.errors import DataError
if rank == 1:
    fail(DataError("chunk 3 of train/tokens is damaged", "crc 1 instead of 2", "prepare again"))
time.sleep(120)
"""
    started = launch(body)
    code, out = started.end()
    assert code == 5
    assert out.splitlines() == [
        "xdist: chunk 3 of train/tokens is damaged",
        "crc 1 instead of 2",
        "prepare again",
        f"details: {started.run}/logs/rank-1.error.json",
    ]
    assert started.status()["exit_code"] == 5


def test_a_rank_that_leaves_no_reason_is_told_with_its_code_and_log(launch: Start) -> None:
    code, out = launch("print('last words', flush=True)\nsys.exit(41 if rank else 0)").end()
    assert code == 41
    assert "rank 1 on " in out
    assert "ended with exit code 41 and left no reason" in out
    assert out.rstrip().endswith("last words")


# Children of a rank: one in the rank's group, one that left it and lost its parent.
FAMILY = """
near = subprocess.Popen(["sleep", "300"])
far = subprocess.run([sys.executable, "-c",
    "import subprocess; print(subprocess.Popen(['sleep', '300'], start_new_session=True,"
    "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"], capture_output=True, text=True)
(run / f"family-{rank}").write_text(f"{near.pid} {far.stdout}")
"""


def _family(started: Launch, ranks: int) -> list[int]:
    files = [started.run / f"family-{rank}" for rank in range(ranks)]
    wait_until(lambda: all(file.exists() and file.read_text().endswith("\n") for file in files))
    return [int(pid) for file in files for pid in file.read_text().split()]


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "time.sleep(300)"])
def test_no_descendant_is_left_after_success_failure_or_a_signal(
    launch: Start, ending: str
) -> None:
    started = launch(FAMILY + ending)
    family = _family(started, 2)
    if "sleep" in ending:
        started.process.send_signal(signal.SIGTERM)
    code, _ = started.end()
    assert code == {"": 0, "sys.exit(3)": 3}.get(ending, 128 + signal.SIGTERM)
    assert not any(alive(pid) for pid in family)


def test_ranks_die_with_a_launcher_that_is_killed(launch: Start) -> None:
    started = launch("time.sleep(300)", 3)
    pids = started.pids(3)
    assert all(alive(pid) for pid in pids)
    started.process.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_even_stubborn_ones(launch: Start, number: int) -> None:
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(run / f'deaf-{rank}').touch()\n"
    started = launch(stubborn + "time.sleep(300)")
    pids = started.pids(2)
    wait_until(lambda: all((started.run / f"deaf-{rank}").exists() for rank in (0, 1)))
    started.process.send_signal(number)
    time.sleep(0.2)
    started.process.send_signal(number)  # the second one does not wait
    code, out = started.end()
    assert code == 128 + number
    assert f"stopped by {signal.Signals(number).name}" in out
    assert "Traceback" not in out
    assert not any(alive(pid) for pid in pids)
    assert started.status()["state"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_ranks_that_save_when_asked_to_stop_end_with_75(launch: Start, number: int) -> None:
    body = """
def save(*_):
    time.sleep(0.3)
    (run / f"saved-{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(run / f"ready-{rank}").touch()
time.sleep(300)
"""
    started = launch(body)
    wait_until(lambda: all((started.run / f"ready-{rank}").exists() for rank in (0, 1)))
    started.process.send_signal(number)
    code, out = started.end()
    assert code == 75
    assert all((started.run / f"saved-{rank}").exists() for rank in (0, 1))
    assert "stopped and saved; go on with: xdist again" in out


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
READY = "(run / f'ready-{rank}').touch()\ntime.sleep(300)\n"


def test_ranks_that_neither_save_nor_end_are_ended_after_stop_timeout_s(launch: Start) -> None:
    started = launch(DEAF + READY, stop_timeout_s=2)
    wait_until(lambda: all((started.run / f"ready-{rank}").exists() for rank in (0, 1)))
    before = time.monotonic()
    started.process.send_signal(signal.SIGTERM)
    assert started.end()[0] == 128 + signal.SIGTERM
    assert 2 <= time.monotonic() - before < 20


def test_a_save_is_not_waited_for_when_a_rank_fails_that_was_asked_to_stop(launch: Start) -> None:
    fails = "if rank: signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nelse: "
    started = launch(fails + DEAF + READY, stop_timeout_s=300)
    wait_until(lambda: all((started.run / f"ready-{rank}").exists() for rank in (0, 1)))
    started.process.send_signal(signal.SIGTERM)
    assert started.end(30)[0] == 128 + signal.SIGTERM


def test_a_signal_leaves_time_for_whatever_the_watchdog_allows() -> None:
    """The rest of a step and a save, one more step and the last save, each at its longest."""
    config = override(Config(), ["train.step_timeout_s=5000", "train.first_step_timeout_s=100"])
    assert stop_timeout_s(config) > 4 * 5000
    assert stop_timeout_s(Config()) > 4 * Config().train.first_step_timeout_s


def test_failure_4_a_rank_that_never_joins_is_named(launch: Start) -> None:
    body = """
if rank != 1:
    pathlib.Path(record.replace(".error.json", ".started")).touch()
time.sleep(300)
"""
    started = launch(body, 3, init_timeout_s=4)
    pids = started.pids(3)
    code, out = started.end()
    assert code == 3
    assert f"2 of 3 ranks joined; missing rank 1 (host {os.uname().nodename})" in out
    assert "launch.init_timeout_s = 4 s" in out
    assert not any(alive(pid) for pid in pids)
    assert started.status()["exit_code"] == 3


def test_ranks_that_met_are_not_hurried(launch: Start) -> None:
    body = """
if rank == 0:
    (run / "logs" / "met").touch()
time.sleep(4.5)
"""
    assert launch(body, init_timeout_s=3).end()[0] == 0


STEPS = """
attempt = len(list(run.glob("attempt-*")))
if rank == 0:
    (run / f"attempt-{attempt}").touch()
    start, stop = plan[min(attempt, len(plan) - 1)]
    lines = "".join(json.dumps({"step": s}) + "\\n" for s in range(1, stop + 1))
    if stop > start:
        (run / ".new").write_text(lines)
        os.replace(run / ".new", run / "metrics.jsonl")
    if (start, stop) == plan[-1]:
        sys.exit(0)
    (run / "status.json").write_text(json.dumps(
        {"state": "running", "last_checkpoint": f"checkpoints/step-{stop}", "note": "kept"}))
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.3)
"""


def test_a_lost_rank_is_restarted_while_steps_are_completed(launch: Start) -> None:
    started = launch("plan = [(0, 2), (2, 3), (3, 5)]\n" + STEPS, restarts=2)
    code, out = started.end()
    assert code == 0, out
    assert "restart 1 of 2" in out
    assert "restart 2 of 2" in out
    assert len(list(started.run.glob("attempt-*"))) == 3


def test_no_restart_without_a_completed_step(launch: Start) -> None:
    started = launch("plan = [(0, 2), (2, 2), (2, 5)]\n" + STEPS, restarts=5)
    code, out = started.end()
    assert code == 7
    assert "restart 1 of 5" in out
    assert "restart 2" not in out
    status = started.status()
    assert (status["step"], status["last_checkpoint"]) == (2, "checkpoints/step-2")
    assert status["note"] == "kept"
    assert "resumes from checkpoints/step-2" in out


def test_restarts_are_counted(launch: Start) -> None:
    started = launch("plan = [(0, 1), (1, 2), (2, 3), (3, 4)]\n" + STEPS, restarts=2)
    assert started.end()[0] == 7
    assert len(list(started.run.glob("attempt-*"))) == 3


def test_a_terminal_stays_one_for_rank_0(tmp_path: pathlib.Path) -> None:
    body = PRELUDE + "print('terminal', os.isatty(1), os.isatty(2), os.isatty(0))"
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", LAUNCH, body, str(tmp_path), "2", "0", "60", "60"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"PYTHONPATH": PATHS},
            timeout=60,
            check=False,
        )
        out = os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 0
    assert out == "terminal True True False\r\n"
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "terminal False False False\n"


def _job(directory: pathlib.Path) -> Job:
    return Job(("train", "", "--error-file"), 2, 1, directory, 0, 60.0, "xdist again", 60.0)


def test_sigkill_on_a_full_host_is_called_likely_the_oom_killer(tmp_path: pathlib.Path) -> None:
    watch = local._Watch([], memory_share=0.931, rss={1: 3 * 2**30})
    failure = local._killed(_job(tmp_path), watch, 1, signal.SIGKILL)
    assert failure.why == (
        "killed by signal 9 (SIGKILL), host memory 93% at last sample: likely the OOM killer; "
        "rank 1 held 3.00 GiB"
    )
    assert "OOM" not in local._killed(_job(tmp_path), watch, 1, signal.SIGSEGV).why


def test_the_script_runs_and_the_config_is_its_argument(tmp_path: pathlib.Path) -> None:
    text = local.script(_job(tmp_path / "a folder"))
    assert 'RANK=1 LOCAL_RANK=1 train "${1:?give the path of a config}"' in text
    program = tmp_path / "train"
    program.write_text('#!/bin/sh\necho "$RANK of $WORLD_SIZE at $MASTER_ADDR: $*"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", text, "script", "my config.toml"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 of 2 at 127.0.0.1: my config.toml\n"
    log = tmp_path / "a folder" / "logs" / "rank-1.log"
    assert log.read_text() == "1 of 2 at 127.0.0.1: my config.toml\n"
    without = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert "give the path of a config" in without.stderr


def test_status_keeps_what_the_launcher_does_not_know(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"st')
    (tmp_path / "status.json").write_text('{"last_checkpoint": "c/step-3", "own": 1}')
    failure = Failure(1, "h", 7, "PeerLost", "died", "why", "", "", 0.0)
    replace_status(tmp_path, failure)
    known = Progress(tmp_path)
    assert (known.step, known.checkpoint) == (5, "c/step-3")
    text = (tmp_path / "status.json").read_text()
    assert '"own": 1' in text
    assert '"reason": "died; why"' in text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_status_that_a_loss_of_power_emptied_stops_no_start(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    (tmp_path / "status.json").write_text("")
    known = Progress(tmp_path)
    assert (known.step, known.checkpoint) == (4, "")
    replace_status(tmp_path, Failure(1, "h", 7, "PeerLost", "died", "why", "", "", 0.0))
    assert '"reason": "died; why"' in (tmp_path / "status.json").read_text()
