"""Judging trained segmenters on the held-out slab: beside thresholds, and each beside the others.

    degraded image, clean image  ->  label maps of every run  ->  Dice of the slab, files, a table

One process predicts whole volumes, without gradients. What runs are judged at all says
`volume.judged`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdist.checkpoint.read import Checkpoint
from xdist.config import Config, load
from xdist.data.nifti import write_nifti
from xdist.models import build
from xdist.models.grid_config import DTYPES
from xdist.volume.dice import confusion, dice
from xdist.volume.judged import check_together, final_checkpoint, recipe_of, store_of
from xdist.volume.montage import grey_picture, label_picture, montage, write_png
from xdist.volume.thresholds import best_thresholds, tissues_of


@dataclasses.dataclass(frozen=True)
class Sample:
    """One volume as the runs see it: images by name, all classes, and the two parts of them."""

    images: dict[str, Tensor]  # "degraded" and "clean", [s1..sk, C]
    truth: Tensor  # [s1..sk]
    train: Tensor  # the same, -100 inside the slab
    test: Tensor  # the same, -100 outside the slab
    classes: tuple[str, ...]
    affine: list[list[float]] | None


@dataclasses.dataclass(frozen=True)
class Score:
    """Dice of each class on the held-out slab."""

    image: str
    who: str
    dice: tuple[float, ...]

    def line(self, classes: Sequence[str]) -> dict[str, object]:
        """For metrics.jsonl; None where neither truth nor prediction has the class."""
        shares = [None if math.isnan(d) else d for d in self.dice]
        return {
            "image": self.image, "who": self.who, "dice": dict(zip(classes, shares, strict=True))
        }  # fmt: skip


def judge(runs: Sequence[Path], out: Path) -> list[Score]:
    """Dice of every run on the slab that its config holds out; files into `out`.

    runs: folders of finished runs, all of one store, slab and degradation; the first is predicted
    on the clean image too, and shown in montage.png. Written: PREDICTED.nii.gz of each run and
    image, truth.nii.gz, montage.png, metrics.jsonl, dice.txt. The thresholds' lines are there
    where the store names its classes grey and white.

    Raises:
        ConfigError: runs of different data or of equal names, or without a slab.
        CheckpointError: a run that has not finished, or without its last checkpoint.
        DataError: the store is not the one that a run was trained on.
    """
    runs = [run.resolve() for run in runs]
    configs = [load(str(run / "config.toml")) for run in runs]
    check_together(runs, configs)
    found = [final_checkpoint(*pair) for pair in zip(runs, configs, strict=True)]
    sample = read_sample(configs[0])
    scores: list[Score] = []
    predicted = {}
    for image in sample.images:
        scores += _by_thresholds(sample, image)
        for number, (run, config) in enumerate(zip(runs, configs, strict=True)):
            if image == "clean" and number:
                continue
            labels = predict(config, found[number], sample.images[image])
            predicted[f"{run.name}_{image}"] = labels
            scores.append(_score(sample, image, run.name, labels))
    _write(out, sample, predicted, scores)
    return scores


def read_sample(config: Config) -> Sample:
    """The first sample of the run's store, whole."""
    data = config.data
    split = store_of(config).split("train")
    slab = (data.slab[0], data.slab[1], data.slab[2])
    box = [(0, size) for size in split.sizes(0)]
    images = {"degraded": split.image(0, box, recipe_of(config)), "clean": split.image(0, box)}
    truth, train, test = (
        torch.from_numpy(one.labels(0, box))
        for one in (split, split.without(slab), split.only(slab))
    )
    return Sample(
        {name: torch.from_numpy(image) for name, image in images.items()},
        truth, train, test, split.classes, split.affine(0),
    )  # fmt: skip


def predict(config: Config, found: Checkpoint, image: Tensor) -> Tensor:
    """The likeliest class of each voxel of `image` `[s1..sk, C]`, by a checkpoint."""
    model = build(config.model, parallel=config.parallel, seed=config.run.seed)
    model.load_state_dict({name: found.read(f"model/{name}") for name in model.state_dict()})
    with torch.no_grad():
        logits = model(image.to(DTYPES[config.model.dtype]).unsqueeze(0))
    labels: Tensor = logits[0].argmax(-1)
    return labels


def table(scores: Sequence[Score], classes: Sequence[str]) -> str:
    """Aligned plain text, one line a score."""
    width = max(len(score.who) for score in scores)
    lines = [f"{'Dice on the held-out slab':{width + 12}}" + "".join(f"{c:>12}" for c in classes)]
    for one in scores:
        cells = "".join(f"{value:12.3f}" for value in one.dice)
        lines.append(f"{one.image:10}  {one.who:{max(width, 13)}}{cells}")
    if tissues_of(classes) is None:
        named = ", ".join(classes)
        lines.append(f"no thresholds beside them: grey, white and a third class are not in {named}")
    return "\n".join(lines)


def _by_thresholds(sample: Sample, image: str) -> list[Score]:
    """Two thresholds on the first channel, fitted outside the slab; none without such classes."""
    tissues = tissues_of(sample.classes)
    if tissues is None:
        return []
    values = sample.images[image][..., 0]
    fitted = best_thresholds(values, sample.train, tissues)
    who = f"thresholds {fitted.low:.3f}, {fitted.high:.3f}"
    return [_score(sample, image, who, fitted.predict(values))]


def _score(sample: Sample, image: str, who: str, predicted: Tensor) -> Score:
    counts = confusion(predicted, sample.test, len(sample.classes))
    return Score(image, who, tuple(dice(counts)))


def _write(
    out: Path, sample: Sample, predicted: dict[str, Tensor], scores: Sequence[Score]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4) if sample.affine is None else np.asarray(sample.affine)
    for name, labels in {"truth": sample.truth, **predicted}.items():
        write_nifti(out / f"{name}.nii.gz", labels.to(torch.uint8).numpy(), affine)
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(one.line(sample.classes)) + "\n" for one in scores)
    (out / "dice.txt").write_text(table(scores, sample.classes) + "\n", encoding="utf-8")
    first = next(iter(predicted.values()))
    write_png(out / "montage.png", _picture(sample, first))


def _picture(sample: Sample, predicted: Tensor) -> NDArray[np.uint8]:
    """Rows: the middle of the slab and of the other dims; columns: image, truth, prediction."""
    held = (sample.test != -100).nonzero()
    middle = [int(x) for x in (held.amin(0) + held.amax(0)) // 2]
    rows = []
    for dim in reversed(range(sample.truth.dim())):
        image, truth, found = (
            np.rot90(x.select(dim, middle[dim]).numpy())
            for x in (sample.images["degraded"][..., 0], sample.truth, predicted)
        )
        rows.append([grey_picture(image), label_picture(truth), label_picture(found)])
    return montage(rows)
