"""Saves of whole runs: in the background, late, failing, cut short."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from tests.end_to_end.training import (
    config_of,
    held_out,
    losses,
    make_store,
    run_here,
    run_until,
    status_of,
)
from xdist.checkpoint import SAVE_POINTS, Cut, clean_stale, load_latest
from xdist.checkpoint.manifest import entry_of, render
from xdist.checkpoint.points import OnPoint, ignore
from xdist.checkpoint.read import Loaded
from xdist.checkpoint.tensor_file import write_tensors
from xdist.config import Checkpoint
from xdist.errors import CheckpointError, NumericsError
from xdist.mesh import Mesh
from xdist.testing import RankPool
from xdist.train import run
from xdist.train.saving import Saving

ROOT = pathlib.Path(__file__).resolve().parents[2]
BEHIND = "checkpoint.asynchronous=true"
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store, and the run `whole`: 6 steps, saved in the step after 2, 4 and 6."""
    made = tmp_path_factory.mktemp("saving")
    make_store(made)
    assert run(config_of(made, "whole")) == 0
    return made


def _checkpoint(folder: pathlib.Path, name: str) -> Loaded:
    found = load_latest(config_of(folder, name).run_directory / "checkpoints")
    assert found is not None
    return found


def _assert_same_end(folder: pathlib.Path, name: str, other: str = "whole") -> None:
    assert losses(config_of(folder, name)) == losses(config_of(folder, other))
    assert held_out(config_of(folder, name)) == held_out(config_of(folder, other))
    ours, theirs = _checkpoint(folder, name), _checkpoint(folder, other)
    assert ours.step == theirs.step
    assert ours.tensors.keys() == theirs.tensors.keys()
    for key, tensor in ours.tensors.items():
        assert torch.equal(tensor, theirs.tensors[key]), key


class Held:
    """Keeps the writing thread from going on in the first save until a later step has begun."""

    def __init__(self, until_step: int) -> None:
        self.points: list[str] = []
        self._left, self._free, self._begun = until_step, threading.Event(), 0

    def __call__(self, name: str) -> None:
        if name == "train.step":
            self._begun += 1
            if self._begun == self._left:
                self._free.set()
        if name == "save.tensors_flushed":
            assert threading.current_thread() is not threading.main_thread()
            assert self._free.wait(PATIENCE_S)
        self.points.append(name)


def test_steps_go_on_while_a_save_is_written(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save of step 2 is held up until step 6: the next one waits, all end well."""
    on_point = Held(until_step=6)
    assert run(config_of(folder, "behind", BEHIND), on_point=on_point) == 0
    points = on_point.points
    begun = points.index("save.begin")
    flushed = points.index("save.tensors_flushed")
    assert points[begun:flushed].count("train.updated") >= 3
    assert points[flushed:].index("save.renamed") > 0
    out = capsys.readouterr().out
    assert "the save due after step 4 waits: that of step 2 is still being written" in out
    _assert_same_end(folder, "behind")
    status = status_of(config_of(folder, "behind"))
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert status["last_checkpoint"].endswith("step-00000006")


def test_two_ranks_save_in_the_background(folder: pathlib.Path, pool2: RankPool) -> None:
    """Bit for bit the checkpoint of the same ranks that saved in the step."""
    two = ("parallel.ulysses=2", "engine.name=fsdp")
    assert pool2.run(run_here, str(folder), "two", *two) == [(0, "")] * 2
    assert pool2.run(run_here, str(folder), "two-behind", *two, BEHIND) == [(0, "")] * 2
    _assert_same_end(folder, "two-behind", "two")


def test_a_signal_waits_for_the_save_in_flight_and_saves_the_last_step(
    folder: pathlib.Path,
) -> None:
    held = Held(until_step=9)

    def on_point(name: str) -> None:
        held(name)
        if name == "train.updated" and held.points.count(name) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            held._free.set()

    config = config_of(folder, "signal", BEHIND)
    assert run(config, on_point=on_point) == 75
    assert held.points.count("save.renamed") == 2
    # The signal came after step 3 was agreed upon, so step 4 is the last.
    assert status_of(config)["last_checkpoint"].endswith("step-00000004")
    assert _checkpoint(folder, "signal").step == 4
    assert run(config) == 0
    _assert_same_end(folder, "signal")


class DiskGone:
    """The disk goes away under the saves with these numbers (from 1): their folder vanishes."""

    def __init__(self, directory: pathlib.Path, *numbers: int) -> None:
        self._directory, self._numbers, self._saves = directory, numbers, 0
        self.points: list[str] = []

    def __call__(self, name: str) -> None:
        self.points.append(name)
        if name == "save.folder_made":
            self._saves += 1
            if self._saves in self._numbers:
                for beside in self._directory.glob(".tmp-*"):
                    shutil.rmtree(beside)


def _on_bad_disk(folder: pathlib.Path, name: str, *numbers: int, settings: tuple[str, ...]) -> str:
    config = config_of(folder, name, *settings)
    gone = DiskGone(config.run_directory / "checkpoints", *numbers)
    code, message = 0, ""
    try:
        code = run(config, on_point=gone)
    except CheckpointError as error:
        code, message = error.exit_code, str(error)
    assert code == (4 if message else 0)
    return message


@pytest.mark.parametrize("settings", [(), (BEHIND,)], ids=["in-step", "behind"])
def test_a_failed_save_warns_and_two_in_a_row_stop(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...]
) -> None:
    name = f"warned-{len(settings)}"
    assert _on_bad_disk(folder, name, 1, settings=settings) == ""
    assert "step 2 was not saved: no checkpoint could be written" in capsys.readouterr().out
    _assert_same_end(folder, name)

    name = f"stopped-{len(settings)}"
    message = _on_bad_disk(folder, name, 1, 2, settings=settings)
    assert "no checkpoint could be written" in message
    config = config_of(folder, name)
    status = status_of(config)
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    # The second save was begun after step 4; behind, its failure surfaces later.
    assert len(losses(config)) in ((4, 5, 6) if settings else (4,))
    assert load_latest(config.run_directory / "checkpoints") is None


@pytest.mark.parametrize("settings", [(), (BEHIND,)], ids=["in-step", "behind"])
def test_a_last_save_that_fails_ends_with_4_and_the_reason(
    folder: pathlib.Path, settings: tuple[str, ...]
) -> None:
    """Never exit 0 without the checkpoint; what was measured is on record all the same."""
    name = f"last-{len(settings)}"
    settings = (*settings, "checkpoint.every_steps=0")
    message = _on_bad_disk(folder, name, 1, settings=settings)
    what, why, do = message.splitlines()
    assert what == "the run ends at step 6, and its last checkpoint could not be saved"
    assert "No such file" in why
    assert "none at all" in do
    config = config_of(folder, name)
    status = status_of(config)
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert "last checkpoint could not be saved" in status["reason"]
    assert held_out(config) == held_out(config_of(folder, "whole"))
    assert run(config) == 0
    _assert_same_end(folder, name)


def test_a_preempted_run_that_cannot_save_does_not_say_75(folder: pathlib.Path) -> None:
    config = config_of(folder, "unsaved", "checkpoint.every_steps=0")
    gone = DiskGone(config.run_directory / "checkpoints", 1)

    def on_point(name: str) -> None:
        gone(name)
        if name == "train.step" and gone.points.count(name) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(CheckpointError, match="the run ends at step 3") as caught:
        run(config, on_point=on_point)
    assert caught.value.exit_code == 4
    assert "none at all" in caught.value.do
    assert status_of(config)["state"] == "failed"


class Tensors:
    """What a save asks of an engine."""

    def __init__(self, step: int) -> None:
        from xdist.checkpoint import Piece, Spec

        self._specs = {n: Spec((9,), torch.float32) for n in ("model/w", "optimizer/m")}
        self._pieces = {n: Piece((9,), 0, torch.full((9,), float(step))) for n in self._specs}

    def specs(self) -> dict:
        return self._specs

    def pieces(self) -> dict:
        return self._pieces


def _save_behind(directory: pathlib.Path, step: int, on_point: OnPoint) -> None:
    saving = Saving(directory, Checkpoint(asynchronous=True), Mesh.one_rank(), on_point)
    saving.save(step, Tensors(step), {"step": step})
    saving.finish()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_at_any_point_of_a_background_save_leaves_the_last_good_one(
    tmp_path: pathlib.Path,
) -> None:
    """SIGKILL of the whole process, from the writing thread, at every named point."""
    for name in SAVE_POINTS:
        directory = tmp_path / name
        for good in (1, 2):
            _save_behind(directory, good, ignore)
        step = 2 if name == "save.old_moved" else 3
        child = os.fork()
        if child == 0:
            try:
                _save_behind(directory, step, Cut(name))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
        clean_stale(directory)
        assert all(path.name.startswith("step-") for path in directory.iterdir())
        late = SAVE_POINTS.index(name) >= SAVE_POINTS.index("save.renamed")
        found = load_latest(directory)
        assert found is not None
        assert found.step == (3 if late else 2), name
        assert torch.equal(found.tensors["model/w"], torch.full((9,), float(found.step)))


KILLED = """
import sys
sys.path[:0] = {paths!r}
import os, pathlib, signal, threading
from tests.end_to_end.training import config_of
from xdist.train import run
flushed, ended, never, counts = threading.Event(), threading.Event(), threading.Event(), {{}}
def on_point(name):
    counts[name] = counts.get(name, 0) + 1
    if name == "save.tensors_flushed":
        flushed.set()
    if name == "save.end":
        ended.set()
    # The first save is done by step 5, the second never gets further than half a manifest.
    if (name, counts[name]) == ("train.step", 3):
        assert flushed.wait(60)
    if (name, counts[name]) == ("train.step", 4):
        assert ended.wait(60)
    if (name, counts[name]) == ("save.manifest_half_written", 2):
        never.wait(60)
    if (name, counts[name]) == ("train.backward", 6):
        os.kill(os.getpid(), signal.SIGKILL)
config = config_of(pathlib.Path({folder!r}), "killed", "checkpoint.asynchronous=true")
run(config, on_point=on_point)
"""


def test_a_process_killed_while_a_save_is_in_flight_ends_as_the_undisturbed_run(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launchers")]
    code = KILLED.format(paths=paths, folder=str(folder))
    done = subprocess.run([sys.executable, "-P", "-c", code], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    config = config_of(folder, "killed")
    left = [path.name for path in (config.run_directory / "checkpoints").iterdir()]
    assert any(name.startswith((".tmp-step-00000004-", ".tmp-step-00000005-")) for name in left)
    assert "step-00000002" in left
    assert run(config) == 0
    assert "step 2," in capsys.readouterr().out
    _assert_same_end(folder, "killed")


def test_values_that_are_not_finite_stop_a_background_save_with_6(tmp_path: pathlib.Path) -> None:
    saving = Saving(tmp_path, Checkpoint(asynchronous=True), Mesh.one_rank())
    bad = Tensors(1)
    bad.pieces()["model/w"].values[3] = torch.nan
    assert saving.save(1, bad, {}) is None
    with pytest.raises(NumericsError, match="model/w"):
        saving.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_save_blocks_only_for_the_copy(tmp_path: pathlib.Path) -> None:
    """With a disk that never answers, `save` returns; nothing of the engine is needed then."""
    answered = threading.Event()

    def on_point(name: str) -> None:
        if name == "save.tensors_written":
            assert answered.wait(PATIENCE_S)

    saving = Saving(tmp_path, Checkpoint(asynchronous=True), Mesh.one_rank(), on_point)
    source = Tensors(5)
    assert saving.save(5, source, {}) is None
    assert not saving.waiting
    for piece in source.pieces().values():
        piece.values.fill_(-1.0)
    answered.set()
    outcome = saving.finish()
    assert outcome is not None
    assert outcome.ok
    found = load_latest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors["model/w"], torch.full((9,), 5.0))


def _first_format(folder: pathlib.Path, name: str) -> None:
    """Rewrite the newest checkpoint of a run as the version before this one wrote it."""
    found = _checkpoint(folder, name)
    shutil.rmtree(found.path)
    found.path.mkdir()
    files = {}
    for group in ("model", "optimizer"):
        held = {n: t for n, t in found.tensors.items() if n.startswith(group)}
        file = f"{group}-00001.safetensors"
        files[file] = write_tensors(found.path / file, held)
    state = {key: value for key, value in found.state.items() if key != "stage_first"}
    data = json.dumps(state).encode()
    (found.path / "state.json").write_bytes(data)
    files["state.json"] = entry_of(data)
    (found.path / "manifest.json").write_bytes(render(found.step, files))


def test_a_run_goes_on_from_a_checkpoint_of_the_first_format(folder: pathlib.Path) -> None:
    run_until(str(folder), "first-format", "train.step", 6)
    _first_format(folder, "first-format")
    assert run(config_of(folder, "first-format")) == 0
    _assert_same_end(folder, "first-format")
