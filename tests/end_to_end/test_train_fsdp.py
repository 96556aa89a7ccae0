"""Whole runs with fsdp: losses, evaluation, bytes beside the plan, and going on after a cut."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.end_to_end.test_failures_train import Poisoned, _poisoned
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
from xdist.testing import RankPool
from xdist.train import run

FSDP = ("engine.name=fsdp", "evaluate.every_steps=3", "train.check_every_steps=2")
DEGREES = {
    "sequence": ("parallel.ring=2", "parallel.layout=zigzag"),
    "data": ("parallel.data=2", "engine.reshard=false"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("fsdp")
    make_store(made)
    assert run(config_of(made, "one")) == 0
    return made


@pytest.mark.parametrize("name", DEGREES)
def test_a_run_has_the_losses_of_one_rank_and_the_bytes_of_the_plan(
    folder: pathlib.Path, pool2: RankPool, name: str
) -> None:
    settings = (*FSDP, *DEGREES[name])
    assert pool2.run(run_here, str(folder), name, *settings) == [(0, "")] * 2
    one, many = config_of(folder, "one"), config_of(folder, name, *settings)
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    assert held_out(many) == pytest.approx(held_out(one), rel=1e-5)
    for line in lines_of(many):
        if "eval" not in line:
            assert line["sent_bytes"] == line["planned_bytes"]
            assert min(line["sent_bytes"]) > 0


def test_a_run_that_was_cut_goes_on_to_the_bit(folder: pathlib.Path, pool2: RankPool) -> None:
    """Every rank wrote its own rows; the optimizer's state is there again."""
    settings = ("engine.name=fsdp", "parallel.ulysses=2", "checkpoint.every_steps=2")
    assert pool2.run(run_here, str(folder), "whole", *settings) == [(0, "")] * 2
    pool2.run(run_until, str(folder), "cut", "train.backward", 6, *settings)
    cut = config_of(folder, "cut", *settings)
    assert status_of(cut)["state"] == "failed"
    assert pool2.run(run_here, str(folder), "cut", *settings) == [(0, "")] * 2
    assert losses(cut) == losses(config_of(folder, "whole"))
    assert held_out(cut) == held_out(config_of(folder, "whole"))
    folders = [f"{name}/checkpoints/step-00000006" for name in ("whole", "cut")]
    files = [sorted((folder / "runs" / f).glob("*.safetensors")) for f in folders]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert {f.name[:10] for f in files[0]} == {"rank-00000", "rank-00001"}
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_steps_of_nan_end_with_6_and_every_rank_tells_its_rows(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    """One step is left out by both ranks; two in a row end the run, and nothing was changed."""
    settings = ("engine.name=fsdp", "parallel.ulysses=2", "train.max_skipped=1")
    where = str(folder)
    assert pool2.run(_poisoned, where, "skipped", (3,), *settings) == [(0, "")] * 2
    lines = [n for n in lines_of(config_of(folder, "skipped")) if "eval" not in n]
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    # Gradients are summed before anybody looks: both hold bad rows.
    assert "rank 0: " in lines[2]["skipped"]
    assert "rank 1: " in lines[2]["skipped"]
    results = pool2.run(_poisoned, where, "bad", (4, 5), *settings)
    assert [code for code, _ in results] == [6, 6]
    config = config_of(folder, "bad", *settings)
    diagnosis = json.loads((config.run_directory / "diagnosis.json").read_text())
    model = Poisoned(config, 1, ())
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert {n: entry["shape"] for n, entry in diagnosis["parameters"].items()} == shapes
    assert all(entry["not_finite"] == 0 for entry in diagnosis["parameters"].values())
    assert min(entry["largest"] for entry in diagnosis["parameters"].values()) > 0


def test_on_one_rank_fsdp_is_the_plain_engine(folder: pathlib.Path) -> None:
    assert run(config_of(folder, "alone", "engine.name=fsdp")) == 0
    assert losses(config_of(folder, "alone")) == losses(config_of(folder, "one"))
