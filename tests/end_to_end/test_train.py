"""Training: the same losses on every number of ranks, what is written, what is printed."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

from tests.end_to_end.training import (
    config_of,
    held_out,
    lines_of,
    losses,
    make_store,
    run_here,
    status_of,
)
from xdist.testing import RankPool
from xdist.train import run

TWENTY = "train.curriculum=[{length=61,batch=2,steps=12},{length=96,batch=2,steps=8}]"
DEGREES = {
    2: [("parallel.ulysses=2",), ("parallel.ring=2", "parallel.layout=zigzag")],
    3: [("parallel.ring=3", "parallel.layout=zigzag")],
    4: [("parallel.data=2", "parallel.ulysses=2"), ("parallel.ring=2", "parallel.ulysses=2")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("train")
    make_store(made)
    return made


def _run_all(folder: str, cases: list[tuple[str, tuple[str, ...]]]) -> list[tuple[int, str]]:
    return [run_here(folder, name, *settings) for name, settings in cases]


PRECISIONS = {
    "float64": (("model.dtype=float64", "train.precision=float64"), 1e-10),
    "float32": ((), 1e-5),
    "muon64": (("model.dtype=float64", "train.precision=float64", "optimizer.name=muon"), 1e-10),
}


def test_loss_curves_agree_on_1_2_3_and_4_ranks(
    folder: pathlib.Path, pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    """20 steps over two lengths, odd sizes, data x sequence, both layouts; and the evaluation."""
    common = (TWENTY, "checkpoint.every_steps=0")
    for name, (settings, _) in PRECISIONS.items():
        assert run(config_of(folder, f"{name}-1", *common, *settings)) == 0
    for ranks, pool in ((2, pool2), (3, pool3), (4, pool4)):
        cases = [
            (f"{name}-{ranks}-{index}", (*common, *settings, *degrees))
            for name, (settings, _) in PRECISIONS.items()
            for index, degrees in enumerate(DEGREES[ranks])
            # What an optimizer does is the same on every rank: two ranks show it.
            if name != "muon64" or (ranks, index) == (2, 0)
        ]
        for codes in pool.run(_run_all, str(folder), cases):
            assert codes == [(0, "")] * len(cases)
        for case, settings in cases:
            name = case.split("-")[0]
            one, many = config_of(folder, f"{name}-1"), config_of(folder, case, *settings)
            tolerance = PRECISIONS[name][1]
            assert losses(many) == pytest.approx(losses(one), rel=tolerance, abs=0)
            assert held_out(many) == pytest.approx(held_out(one), rel=tolerance, abs=0)
            for line in lines_of(many):
                if "eval" not in line:
                    assert len(line["peak_memory_bytes"]) == ranks
                    assert line["sent_bytes"] == line["planned_bytes"]
                    assert min(line["sent_bytes"]) > 0


def test_losses_fall_and_repeat_to_the_bit(folder: pathlib.Path) -> None:
    for name in ("first", "second"):
        assert run(config_of(folder, name)) == 0
    first, second = (losses(config_of(folder, name)) for name in ("first", "second"))
    assert first == second
    assert first[-1] < first[0]
    other = config_of(folder, "other-seed", "run.seed=1")
    assert run(other) == 0
    assert losses(other) != first


def test_accumulation_changes_nothing(folder: pathlib.Path) -> None:
    """Valid tokens are counted over the whole global batch: separate documents leave labels out
    unevenly, and the mean is still that over all of them."""
    exact = ("model.dtype=float64", "train.precision=float64", "data.documents=separate")
    stages = "train.curriculum=[{length=90,batch=%d,steps=6}]"
    together = config_of(folder, "accumulated", *exact, stages % 1, "train.accumulation=4")
    assert run(together) == 0
    joined = (*exact[:2], "data.documents=join")
    for name, batch, count in (("four", 4, 1), ("two", 2, 2), ("one", 1, 4)):
        config = config_of(folder, name, *joined, stages % batch, f"train.accumulation={count}")
        assert run(config) == 0
    four = losses(config_of(folder, "four"))
    assert losses(config_of(folder, "two")) == pytest.approx(four, rel=1e-12)
    assert losses(config_of(folder, "one")) == pytest.approx(four, rel=1e-12)
    assert losses(together) != pytest.approx(four, rel=1e-6)


def test_separate_documents_on_data_and_sequence_ranks(
    folder: pathlib.Path, pool4: RankPool
) -> None:
    """Each data rank has documents of its own; uneven numbers of valid tokens."""
    exact = ("model.dtype=float64", "train.precision=float64", "data.documents=separate")
    one = ("train.curriculum=[{length=90,batch=1,steps=6}]", "train.accumulation=2")
    two = ("train.curriculum=[{length=90,batch=2,steps=6}]", "parallel.data=2", "parallel.ring=2")
    assert run(config_of(folder, "documents-1", *exact, *one)) == 0
    assert pool4.run(run_here, str(folder), "documents-4", *exact, *two) == [(0, "")] * 4
    reference = losses(config_of(folder, "documents-1"))
    assert losses(config_of(folder, "documents-4")) == pytest.approx(reference, rel=1e-10, abs=0)


def test_bfloat16_keeps_parameters_in_float32(folder: pathlib.Path) -> None:
    from xdist.checkpoint import load_latest

    config = config_of(folder, "bfloat16", "train.precision=bfloat16")
    assert run(config) == 0
    loaded = load_latest(config.run_directory / "checkpoints")
    assert loaded is not None
    assert {str(t.dtype) for t in loaded.tensors.values()} == {"torch.float32"}


def test_what_a_run_writes(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(folder, "written", "evaluate.every_steps=3", "log.every_steps=2")
    assert run(config) == 0
    steps = [line for line in lines_of(config) if "eval" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["sequence_length"] for line in steps] == [61] * 3 + [96] * 3
    assert [line["step"] for line in lines_of(config) if "eval" in line] == [3, 6]
    for line in steps:
        assert line["tokens_per_s"] > 0
        assert line["peak_memory_bytes"][0] > 1 << 20
        assert line["sent_bytes"] == line["planned_bytes"] == [0]
    status = status_of(config)
    assert set(status) == {
        "state", "step", "exit_code", "rank", "host", "reason", "last_checkpoint",
    }  # fmt: skip
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 6, 0)
    assert pathlib.Path(status["last_checkpoint"]).name == "step-00000006"
    assert (config.run_directory / "config.toml").exists()
    out = capsys.readouterr().out
    assert "fresh start" in out
    assert sum(line.startswith("step ") for line in out.splitlines()) == 3
    assert "order-0 entropy" in out
    assert "xz -9e" in out
    assert "equal in every step" in out
    report = (config.run_directory / "report.html").read_text()
    assert "<svg" in report
    assert "src=" not in report
    assert "http" not in report


def test_the_resolved_config_repeats_the_run(folder: pathlib.Path) -> None:
    from xdist.config import load, override

    config = config_of(folder, "resolved", "optimizer.learning_rate=0.01")
    assert run(config) == 0
    again = override(load(config.run_directory / "config.toml"), ["run.name=again"])
    assert run(again) == 0
    assert losses(again) == losses(config)


def test_tensorboard_writes_events_or_names_the_extra(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorboard") is not None:
        config = config_of(folder, "board", "log.tensorboard=true")
        assert run(config) == 0
        assert list((config.run_directory / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, message = run_here(str(folder), "no-board", "log.tensorboard=true")
    assert code == 2
    assert "pip install 'xdist-train[tensorboard]'" in message
    status = status_of(config_of(folder, "no-board"))
    assert (status["state"], status["exit_code"]) == ("failed", 2)
