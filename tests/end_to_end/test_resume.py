"""An interrupted run goes on as if nothing had been: same bits on the same ranks, same losses on
others; and what is refused (failures 7, 8 and 9)."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator

import pytest
from torch import nn

from tests.end_to_end.training import (
    config_of,
    held_out,
    lines_of,
    losses,
    make_store,
    run_here,
    run_until,
    status_of,
)
from xdist.checkpoint import Cut
from xdist.config import Config
from xdist.testing import RankPool
from xdist.train import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store, and the run `whole` that nothing disturbed: 6 steps, saved after 2, 4 and 6."""
    made = tmp_path_factory.mktemp("resume")
    make_store(made)
    assert run(config_of(made, "whole")) == 0
    return made


def _interrupted(folder: pathlib.Path, name: str, *settings: str) -> None:
    """A run that ended in its sixth step; newest checkpoints: steps 2 and 4."""
    run_until(str(folder), name, "train.backward", 6, *settings)


def _steps(folder: pathlib.Path, name: str) -> list[int]:
    return [line["step"] for line in lines_of(config_of(folder, name)) if "eval" not in line]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_on_the_same_ranks_is_bit_equal(folder: pathlib.Path, optimizer: str) -> None:
    setting = f"optimizer.name={optimizer}"
    whole = config_of(folder, f"whole-{optimizer}", setting)
    assert run(whole) == 0
    name = f"same-{optimizer}"
    _interrupted(folder, name, setting)
    config = config_of(folder, name, setting)
    assert status_of(config)["state"] == "failed"
    assert run(config) == 0
    assert _steps(folder, name) == [1, 2, 3, 4, 5, 6]
    assert losses(config) == losses(whole)
    assert held_out(config) == held_out(whole)
    newest = "checkpoints/step-00000006"
    for file in sorted((whole.run_directory / newest).glob("*.safetensors")):
        assert file.read_bytes() == (config.run_directory / newest / file.name).read_bytes()


def test_resuming_a_finished_run_trains_nothing(folder: pathlib.Path) -> None:
    config = config_of(folder, "whole")
    before = lines_of(config)
    assert run(config) == 0
    after = lines_of(config)
    assert [line for line in after if "eval" not in line] == before[: len(after) - 1]
    assert sum("eval" in line for line in after) == 1


def test_failure_8_other_ranks_go_on_with_the_same_losses(
    folder: pathlib.Path, pool2: RankPool, pool3: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    """2 ranks, cut in step 4, then 3 ranks, cut in step 6, then 1 rank."""
    exact = ("model.dtype=float64", "train.precision=float64")
    assert run(config_of(folder, "whole64", *exact)) == 0
    two = (*exact, "parallel.ulysses=2", "parallel.layout=zigzag")
    pool2.run(run_until, str(folder), "moved", "train.step", 4, *two)
    three = (*exact, "parallel.ring=3")
    pool3.run(run_until, str(folder), "moved", "train.step", 4, *three)
    capfd.readouterr()
    assert run(config_of(folder, "moved", *exact)) == 0
    out = capfd.readouterr().out
    assert (
        "resumed 3->1 ranks, sequence ranks 3->1, data 1, global batch unchanged 2, step 4, "
        "data cursor 8 samples, no random state to restore"
    ) in out
    moved, whole = config_of(folder, "moved"), config_of(folder, "whole64")
    assert _steps(folder, "moved") == [1, 2, 3, 4, 5, 6]
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-10, abs=0)
    assert held_out(moved) == pytest.approx(held_out(whole), rel=1e-10, abs=0)


def test_accumulation_may_be_traded_against_batch(folder: pathlib.Path) -> None:
    _interrupted(folder, "traded")
    stages = "train.curriculum=[{length=61,batch=1,steps=3},{length=96,batch=1,steps=3}]"
    config = config_of(folder, "traded", stages, "train.accumulation=2")
    assert run(config) == 0
    assert losses(config) == pytest.approx(losses(config_of(folder, "whole")), rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.accumulation=2", ["global batch changed", "2 samples", "now it is 4"]),
        ("run.seed=3", ["seed changed", "run.seed was 0 and is 3"]),
        ("train.curriculum=[{length=61,batch=2,steps=3}]", ["beyond the end", "has 3"]),
    ],
)
def test_another_data_order_is_refused(
    folder: pathlib.Path, setting: str, words: list[str]
) -> None:
    """Steps 1 to 4 would have seen other samples: exit 2, nothing changed."""
    name = "order" + setting.partition("=")[0]
    _interrupted(folder, name)
    before = lines_of(config_of(folder, name))
    code, message = run_here(str(folder), name, setting)
    assert code == 2
    assert len(message.splitlines()) == 3
    for word in words:
        assert word in message
    assert lines_of(config_of(folder, name)) == before


def test_another_model_is_refused(folder: pathlib.Path) -> None:
    _interrupted(folder, "model")
    code, message = run_here(str(folder), "model", "model.dim=32")
    assert code == 4
    assert "does not fit this model" in message


def _break(folder: pathlib.Path, name: str, step: int) -> None:
    """Flip one bit of the model's tensors in a checkpoint."""
    directory = config_of(folder, name).run_directory / "checkpoints" / f"step-{step:08}"
    file = next(directory.glob("*-model-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def test_failure_7_a_damaged_checkpoint_is_passed_over_loudly(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("damaged", "strict", "all-damaged"):
        _interrupted(folder, name)
        _break(folder, name, 4)
    capsys.readouterr()
    assert run(config_of(folder, "damaged")) == 0
    out = capsys.readouterr().out
    assert (
        "step-00000004 rejected: rank-00000-model-00001.safetensors sha256 mismatch (want " in out
    )
    assert "using step-00000002: 2 steps are lost and will be repeated" in out
    assert losses(config_of(folder, "damaged")) == losses(config_of(folder, "whole"))
    assert _steps(folder, "damaged") == [1, 2, 3, 4, 5, 6]

    code, message = run_here(str(folder), "strict", "checkpoint.resume=strict")
    assert code == 4
    assert "sha256 mismatch" in message

    _break(folder, "all-damaged", 2)
    code, message = run_here(str(folder), "all-damaged")
    assert code == 4
    assert "none of them is whole" in message
    status = status_of(config_of(folder, "all-damaged"))
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 4, 0)
    # Never from scratch: the metrics are those of the interrupted run.
    assert _steps(folder, "all-damaged") == [1, 2, 3, 4, 5]


def test_resume_never_wants_a_new_folder(folder: pathlib.Path) -> None:
    _interrupted(folder, "never")
    code, message = run_here(str(folder), "never", "checkpoint.resume=never")
    assert code == 4
    assert "never" in message


def test_failure_9_other_data_are_refused_unless_allowed(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _interrupted(folder, "data")
    other = make_store(tmp_path, seed=1)
    code, message = run_here(str(folder), "data", f"data.store={other}")
    assert code == 5
    what, why, do = message.splitlines()
    assert "the data changed" in what
    assert "fingerprint" in why
    assert "splits.train" in why
    assert "data.allow_fingerprint_change=true" in do
    assert status_of(config_of(folder, "data"))["exit_code"] == 5
    capsys.readouterr()
    allowed = (f"data.store={other}", "data.allow_fingerprint_change=true")
    assert run_here(str(folder), "data", *allowed) == (0, "")
    assert "allowed by the config" in capsys.readouterr().out


def _signal_at(number: int, times: int = 1) -> Cut:
    """Sends this process a signal when its third step begins."""

    def send(_: str) -> None:
        for _i in range(times):
            os.kill(os.getpid(), number)
            # A handler runs between two instructions.
            time.sleep(0.01)

    return Cut("train.step", 3, send)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT does here what it does at a terminal; a script's background job would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_ends_with_75(
    folder: pathlib.Path, number: signal.Signals
) -> None:
    config = config_of(folder, f"signal-{number.name}", "checkpoint.every_steps=0")
    before = signal.getsignal(number)
    assert run(config, on_point=_signal_at(number)) == 75
    assert signal.getsignal(number) is before
    status = status_of(config)
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", 3, 75)
    assert status["reason"] == f"received {number.name}"
    assert status["last_checkpoint"].endswith("step-00000003")
    assert run(config) == 0
    assert losses(config) == losses(config_of(folder, "whole"))


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_a_run_at_once_that_has_no_young_checkpoint(
    folder: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder, "twice", "checkpoint.every_steps=0")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(config, on_point=_signal_at(signal.SIGINT, times=2))
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("a second Ctrl-C stops at once") == 1
    status = status_of(config)
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 2, 130)


def test_ctrl_c_stays_ignored_where_it_was(folder: pathlib.Path) -> None:
    """A script's job in the background, which a Ctrl-C to the script is not meant for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(config_of(folder, "ignored"), on_point=_signal_at(signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_ranks_say_that_they_met_before_they_build_and_resume(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch.init_timeout_s of the launchers bounds the meeting, not what comes after it."""
    from xdist.train import setup
    from xdist_launchers.job import Job

    config = config_of(folder, "met")
    job = Job((), 1, 1, config.run_directory, 0, 1.0, "", 1.0)
    build, seen = setup.build_model, []

    def built(config: Config) -> nn.Module:
        seen.append((job.met_file.exists(), (config.run_directory / "status.json").exists()))
        return build(config)

    monkeypatch.setattr(setup, "build_model", built)
    assert run(config) == 0
    assert seen == [(True, False)]


def test_a_torn_line_of_metrics_is_mended(folder: pathlib.Path) -> None:
    _interrupted(folder, "torn")
    config = config_of(folder, "torn")
    with (config.run_directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 5.')
    assert run(config) == 0
    assert losses(config) == losses(config_of(folder, "whole"))


def test_a_finished_run_moved_elsewhere_still_resumes(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Nothing in a run's folder depends on where it is."""
    _interrupted(folder, "before-move")
    shutil.copytree(folder / "runs" / "before-move", tmp_path / "runs" / "before-move")
    config = config_of(folder, "before-move", f"run.directory={tmp_path / 'runs'}")
    assert run(config) == 0
    assert losses(config) == losses(config_of(folder, "whole"))
    state = config.run_directory / "checkpoints" / "step-00000006" / "state.json"
    assert json.loads(state.read_text())["sample_cursor"] == 12
