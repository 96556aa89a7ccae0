"""Runs of segmenters judged on their held-out slab: scores, label maps, montage, refusals."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch

from tests.end_to_end.grid_training import SIZES, config_of, make_stores
from tests.end_to_end.training import lines_of
from xdist.config import load
from xdist.errors import CheckpointError, ConfigError, DataError
from xdist.train import run

pytestmark = pytest.mark.slow
SHORT = ("train.curriculum=[{batch=2,steps=2}]", "checkpoint.every_steps=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A volume, a run with scans and one without."""
    made = tmp_path_factory.mktemp("judged")
    make_stores(made)
    named = make_named(made, made / "named.zarr", made / "t1.nii")
    assert run(config_of(made, "mamba_nd", "with", *SHORT, named)) == 0
    assert (
        run(config_of(made, "mamba_nd", "without", *SHORT, named, "model.options.scan=none")) == 0
    )
    return made


def make_named(folder: pathlib.Path, store: pathlib.Path, image: pathlib.Path) -> str:
    """The volume in a store that names its classes; the setting that reads it."""
    from xdist.data.volume import Volume, prepare_volume

    volume = Volume((image,), labels=folder / "classes.nii")
    prepare_volume([volume], store, classes=("background", "grey", "white"))
    return f"data.store={store}"


def copied(folder: pathlib.Path, place: str) -> pathlib.Path:
    """A copy of the run with scans."""
    return pathlib.Path(shutil.copytree(folder / "runs" / "with", folder / place))


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

    other = copied(folder, "other")
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("noise = 10.0", "noise = 11.0"))
    with pytest.raises(ConfigError, match=r"differ in \[data\]"):
        judge([folder / "runs" / "with", other], folder / "not")
    # Alone, it is of another data set than its checkpoint.
    with pytest.raises(DataError, match=r"(?s)not the store .*degraded.*10\.0 -> 11\.0.*train"):
        judge([other], folder / "not")


def test_a_store_that_was_prepared_again_from_other_files_is_refused(folder: pathlib.Path) -> None:
    from xdist.data.nifti import read_nifti, write_nifti
    from xdist.volume.judge import judge

    other = copied(folder, "elsewhere/with")
    values = read_nifti(folder / "t1.nii").values
    write_nifti(folder / "t2.nii", np.flip(values, 0).copy(), np.eye(4))
    made = make_named(folder, folder / "other.zarr", folder / "t2.nii").partition("=")[2]
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace(str(folder / "named.zarr"), made))
    with pytest.raises(DataError, match=r"(?s)not the store .*sha256.*->.*prepare it"):
        judge([other], folder / "not")


def test_runs_that_did_not_finish_are_refused(folder: pathlib.Path) -> None:
    """Each with where it stands and how to go on; nothing is written."""
    from xdist.volume.judge import judge

    other = copied(folder, "cut")
    status = other / "status.json"
    said = json.loads(status.read_text())
    assert (said["state"], said["step"]) == ("finished", 2)
    go_on = rf"(?:.|\n)*xdist launch local {other / 'config.toml'}"
    for change, words in (
        ({"state": "preempted", "step": 1}, "has not finished\n.*'preempted' at step 1"),
        ({"step": 3}, "last step of .*\n.*ended at step 3; the newest whole one is 2"),
    ):
        status.write_text(json.dumps(said | change))
        with pytest.raises(CheckpointError, match=words + go_on):
            judge([folder / "runs" / "with", other], folder / "not")
    status.unlink()
    with pytest.raises(CheckpointError, match="'unknown' at step 0"):
        judge([other], folder / "not")
    status.write_text(json.dumps(said))
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(CheckpointError, match="step 2; there is none" + go_on):
        judge([other], folder / "not")
    assert not (folder / "not").exists()


def test_runs_of_equal_names_are_refused(folder: pathlib.Path) -> None:
    from xdist.volume.judge import judge

    one = folder / "runs" / "with"
    with pytest.raises(ConfigError, match=r"(?s)equal names.*with: .*runs/with, .*there/with"):
        judge([one, copied(folder, "there/with")], folder / "not")


def test_a_store_without_named_tissues_has_no_thresholds(folder: pathlib.Path) -> None:
    """What is missing is said in the table."""
    from xdist.volume.judge import judge

    assert run(config_of(folder, "mamba_nd", "nameless", *SHORT)) == 0
    scores = judge([folder / "runs" / "nameless"], folder / "judged_nameless")
    assert [one.who for one in scores] == ["nameless", "nameless"]
    said = (folder / "judged_nameless" / "dice.txt").read_text()
    assert "no thresholds" in said
    assert "class0, class1, class2" in said
