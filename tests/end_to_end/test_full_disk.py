"""A disk that takes no more, and a reader of the output that has left, in the middle of a run."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.end_to_end.training import config_of, lines_of, make_store, status_of
from tests.launchers.conftest import PATHS

# Runs in one process whose disk is full between two steps of each: no file grows then. A second
# run goes on without saves; the third one saves in every step.
BODY = """
import json, pathlib, resource, sys
from tests.end_to_end.training import config_of
from xdist.errors import XdistError
from xdist.train import run
folder = pathlib.Path(sys.argv[1])
def disk(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def codes(name, full, free, *settings):
    steps = [0]
    def on_point(point):
        steps[0] += point == "train.step"
        if point == "train.step" and steps[0] in (full, free):
            disk(0 if steps[0] == full else resource.RLIM_INFINITY)
    try:
        return run(config_of(folder, name, "log.every_steps=1", *settings), on_point=on_point)
    except XdistError as error:
        return [error.exit_code, error.what]
    finally:
        disk(resource.RLIM_INFINITY)
whole = codes("whole", 0, 0, "checkpoint.every_steps=0")
for_a_while = codes("for-a-while", 2, 5, "checkpoint.every_steps=0")
print(json.dumps([whole, for_a_while, codes("saves", 3, 0, "checkpoint.every_steps=1")]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store."""
    made = tmp_path_factory.mktemp("full")
    make_store(made)
    return made


@pytest.fixture(scope="module")
def ended(folder: pathlib.Path) -> tuple[list[Any], str]:
    """How the runs of BODY ended, and what was said on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", BODY, str(folder)],
        env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    print(done.stdout, done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def _without_times(folder: pathlib.Path, name: str) -> list[Any]:
    lines = lines_of(config_of(folder, name))
    return [(line["step"], line.get("loss"), line.get("eval", {}).get("loss")) for line in lines]


def test_a_disk_that_is_full_for_a_while_costs_no_line(
    folder: pathlib.Path, ended: tuple[list[Any], str]
) -> None:
    codes, said = ended
    assert codes[:2] == [0, 0]
    assert _without_times(folder, "for-a-while") == _without_times(folder, "whole")
    status = status_of(config_of(folder, "for-a-while"))
    assert (status["state"], status["step"]) == ("finished", 6)
    # Once in each run, not in every step.
    assert said.count("xdist: metrics.jsonl could not be written") == 2
    assert said.count("xdist: status.json could not be written") == 2


def test_two_failed_saves_on_a_full_disk_end_with_4(
    folder: pathlib.Path, ended: tuple[list[Any], str]
) -> None:
    """status.json cannot be written either: that does not hide the error."""
    codes, said = ended
    assert codes[2][0] == 4
    assert "no checkpoint could be written" in codes[2][1]
    assert "status.json (failed) could not be written" in said
    assert "the last lines of metrics.jsonl (2) could not be written" in said
    status = status_of(config_of(folder, "saves"))
    assert (status["state"], status["last_checkpoint"][-8:]) == ("running", "00000002")
    run = config_of(folder, "saves").run_directory
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


# A watchdog of one rank; when its limit is over its folder can neither be written nor looked at.
ALONE = """
import errno, os, pathlib, sys, time
from xdist.mesh import Mesh
from xdist.train import watchdog
folder = pathlib.Path(sys.argv[1])
dog = watchdog.Watchdog(
    folder, 0, watchdog.Limits(2.0, 2.0), on_abort=watchdog.replace, poll=lambda: None
)
dog.open(Mesh.one_rank())
stat = os.stat
def gone(path, *more, **named):
    if str(folder) in str(path):
        raise OSError(errno.ESTALE, "Stale file handle")
    return stat(path, *more, **named)
def full(*given, **named):
    raise OSError(errno.ENOSPC, "No space left on device")
os.stat, watchdog.replace = gone, full
dog._on_abort = full
time.sleep(30)
"""


def test_a_watchdog_whose_folder_is_gone_ends_the_process(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert "rank-0.hang.json could not be written: [Errno 28] No space left" in done.stderr


def test_a_reader_that_has_left_ends_no_run(folder: pathlib.Path) -> None:
    """As of `| head`: all steps are made, and the exit code is not 120, that of a failed flush."""
    from xdist.config import to_toml

    config = config_of(folder, "unread", "launch.ranks=1", "log.every_steps=1")
    path = folder / "unread.toml"
    path.write_text(to_toml(config))
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "xdist_launchers.cli", "launch", "local", str(path)],
        env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert status_of(config)["state"] == "finished"


PASSED_ON = """
import sys
from types import SimpleNamespace
from xdist.console import pass_on, say
from xdist_launchers.ray_actor import Answer
from xdist_launchers.ray_attempt import Attempt
attempt = object.__new__(Attempt)
for line in range(3):
    pass_on(b"of a rank\\n", sys.stdout)
    say("of this process", sys.stdout)
    attempt._note(SimpleNamespace(ended_at=None), Answer(None, None, 0, 0.0, b"of an actor"))
"""


def test_nothing_is_left_to_flush_for_a_reader_that_has_left() -> None:
    """What the launchers for MPI and Ray pass on: else Python ends with 120."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PASSED_ON],
        env=os.environ | {"PYTHONPATH": PATHS},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# The writer's thread fails at the disk, keeps the error and raises it from later calls.
EVENTS = """
import errno, pathlib, sys
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from xdist.train.evaluate import Evaluation
from xdist.train.tensorboard import Board
def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")
board = Board(pathlib.Path(sys.argv[1]))
RecordWriter.write = full
for step in range(30):
    board.evaluation(step, Evaluation(1.0, 8, 8, 8))
board.close()
board.evaluation(31, Evaluation(1.0, 8, 8, 8))
"""


def test_events_that_a_full_disk_refuses_end_no_run(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVENTS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("TensorBoard's events could not be written: [Errno 28]") == 1
