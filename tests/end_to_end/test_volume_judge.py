"""Runs of segmenters judged on their held-out slab: scores, label maps, montage, refusals."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch

from tests.end_to_end.grid_training import SIZES, config_of, make_stores
from tests.end_to_end.training import lines_of
from xdist.config import load
from xdist.errors import CheckpointError, ConfigError
from xdist.train import run

pytestmark = pytest.mark.slow
SHORT = ("train.curriculum=[{batch=2,steps=2}]", "checkpoint.every_steps=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A volume, a run with scans and one without."""
    pytest.importorskip("nibabel")
    made = tmp_path_factory.mktemp("judged")
    make_stores(made)
    assert run(config_of(made, "mamba_nd", "with", *SHORT)) == 0
    assert run(config_of(made, "mamba_nd", "without", *SHORT, "model.options.scan=none")) == 0
    return made


def test_runs_are_judged_beside_thresholds(folder: pathlib.Path) -> None:
    """Dice is that of the run's own evaluation; files hold what was predicted."""
    from xdist.data.nifti import read_nifti
    from xdist.volume.judge import judge, read_sample

    runs = [folder / "runs" / name for name in ("with", "without")]
    out = folder / "judged"
    scores = judge(runs, out)
    who = [(one.image, one.who.split()[0]) for one in scores]
    assert who == [
        ("degraded", "thresholds"), ("degraded", "with"), ("degraded", "without"),
        ("clean", "thresholds"), ("clean", "with"),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["who"] for line in lines] == [one.who for one in scores]
    for run_folder, score in zip(runs, scores[1:3], strict=True):
        said = [
            line["eval"]
            for line in lines_of(load(str(run_folder / "config.toml")))
            if "eval" in line
        ][-1]["dice"]
        assert list(said.values()) == pytest.approx(list(score.dice), nan_ok=True)
    sample = read_sample(load(str(runs[0] / "config.toml")))
    held = (sample.test != -100).nonzero()
    assert held[:, 2].min() == 2
    assert held[:, 2].max() == 3
    assert torch.equal((sample.train == -100), (sample.test != -100))
    truth = read_nifti(out / "truth.nii.gz").values
    assert np.array_equal(truth.reshape(SIZES), sample.truth.numpy())
    for name in ("with_degraded", "without_degraded", "with_clean"):
        assert read_nifti(out / f"{name}.nii.gz").values.max() < 3
    assert (out / "montage.png").stat().st_size > 100
    assert (out / "dice.txt").read_text().count("\n") == 6


def test_runs_of_other_data_are_not_compared(folder: pathlib.Path) -> None:
    from xdist.volume.judge import judge

    other = folder / "runs" / "other"
    other.mkdir()
    text = (folder / "runs" / "with" / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("noise = 10.0", "noise = 11.0"))
    with pytest.raises(ConfigError, match=r"differ in \[data\]"):
        judge([folder / "runs" / "with", other], folder / "not")
    (other / "config.toml").write_text(text)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        judge([other], folder / "not")
