"""Training on a task: scored answers alone make the loss, accuracy over shards, resuming."""

from __future__ import annotations

import pathlib

import pytest
import torch

from tests.end_to_end.training import CutShortError, cut_short, lines_of, losses
from xdist.checkpoint import Cut, load_latest
from xdist.config import Config, override, parse
from xdist.data import TextStore, prepare_task
from xdist.errors import DataError
from xdist.models import build
from xdist.testing import RankPool
from xdist.train import run

TEXT = """
[model]
vocab_size = 16
dim = 16
head_dim = 8
pattern = "linear,attention"
window = 9
dtype = "float64"
[train]
precision = "float64"
curriculum = [{ length = 24, batch = 4, steps = 6 }]
tile_tokens = 40
[optimizer]
warmup_steps = 2
[checkpoint]
every_steps = 3
[evaluate]
tokens = 200
length = 24
every_steps = 3
[log]
every_steps = 1000
"""
SEPARATE = (
    "data.documents=separate", "train.curriculum=[{length=72,batch=1,steps=3}]",
    "evaluate.length=48",
)  # fmt: skip


def config_of(folder: pathlib.Path, name: str, *settings: str) -> Config:
    chosen = [f"run.directory={folder / 'runs'}", f"data.store={folder / 'mqar'}"]
    return override(parse(TEXT, "task.toml"), [*chosen, f"run.name={name}", *settings])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("task")
    options = {"vocab": 16, "pairs": 5, "queries": 4}
    prepare_task("mqar", made / "mqar", length=24, samples=64, held_out=9, **options)
    return made


def evaluations(config: Config) -> list[dict]:
    return [line["eval"] for line in lines_of(config) if "eval" in line]


def run_both(folder: str, names: list[tuple[str, tuple[str, ...]]]) -> list[int]:
    return [run(config_of(pathlib.Path(folder), name, *settings)) for name, settings in names]


def test_losses_and_accuracy_are_the_same_on_1_and_2_ranks(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    cases = {
        "ring": ("parallel.ring=2", "parallel.layout=zigzag"),
        "data": ("parallel.data=2",),
        "separate": ("parallel.ring=2", *SEPARATE),
    }
    named = [(f"{name}-2", settings) for name, settings in cases.items()]
    assert pool2.run(run_both, str(folder), named) == [[0, 0, 0]] * 2
    assert run_both(str(folder), [("one", ()), ("separate-1", SEPARATE)]) == [0, 0]
    for name, one in (("ring-2", "one"), ("data-2", "one"), ("separate-2", "separate-1")):
        many, alone = config_of(folder, name), config_of(folder, one)
        assert losses(many) == pytest.approx(losses(alone), rel=1e-10)
        for found, wanted in zip(evaluations(many), evaluations(alone), strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-10)
            assert found["accuracy"] == wanted["accuracy"]
            # 200 tokens are 8 whole samples of 24, each with 4 answers.
            assert (found["tokens"], found["read_tokens"]) == (32, 192)


def test_accuracy_is_the_share_of_right_answers_of_the_saved_model(folder: pathlib.Path) -> None:
    config = config_of(folder, "saved")
    assert run(config) == 0
    loaded = load_latest(config.run_directory / "checkpoints")
    assert loaded is not None
    model = build(config.model, precision="float64")
    model.load_state_dict(
        {k.removeprefix("model/"): v for k, v in loaded.tensors.items() if k.startswith("model/")}
    )
    split = TextStore(folder / "mqar").split("held_out")
    tokens = torch.from_numpy(split.read(0, 192).reshape(8, 24)).long()
    answers = torch.from_numpy(split.labels(0, 192).reshape(8, 24))
    with torch.no_grad():
        right = (model(tokens).argmax(-1) == answers) & (answers >= 0)
    assert evaluations(config)[-1]["accuracy"] == int(right.sum()) / 32


def test_a_task_is_resumed_to_the_bit(folder: pathlib.Path) -> None:
    assert run(config_of(folder, "whole")) == 0
    with pytest.raises(CutShortError):
        run(config_of(folder, "cut"), on_point=Cut("train.step", 5, cut_short))
    assert run(config_of(folder, "cut")) == 0
    assert losses(config_of(folder, "cut")) == losses(config_of(folder, "whole"))
    assert (
        evaluations(config_of(folder, "cut"))[-1]["accuracy"]
        == (evaluations(config_of(folder, "whole"))[-1]["accuracy"])
    )


def test_lengths_that_cut_samples_are_refused_before_the_first_step(folder: pathlib.Path) -> None:
    for settings in (("evaluate.length=25",), ("train.curriculum=[{length=48,batch=1,steps=1}]",)):
        config = config_of(folder, "refused", *settings)
        with pytest.raises(DataError, match="a sample of this task has 24 tokens"):
            run(config)
        assert not lines_of(config)


def test_other_answers_are_other_data(folder: pathlib.Path) -> None:
    """The fingerprint covers the task: a run does not go on with another seed's samples."""
    prepare_task(
        "mqar", folder / "other", length=24, samples=64, held_out=9, vocab=16, pairs=5, queries=4,
        seed=1,
    )  # fmt: skip
    assert run(config_of(folder, "moved")) == 0
    config = override(config_of(folder, "moved"), [f"data.store={folder / 'other'}"])
    with pytest.raises(DataError, match=r"task\.seed: 0 -> 1"):
        run(config)
