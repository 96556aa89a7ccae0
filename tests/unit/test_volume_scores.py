"""Dice, the thresholds' baseline and the montage against what they are by definition."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from xdist.errors import ShapeError
from xdist.volume import (
    Thresholds,
    Tissues,
    best_thresholds,
    confusion,
    dice,
    montage,
    tissues_of,
    write_png,
)
from xdist.volume.montage import grey_picture, label_picture


def test_dice_is_twice_the_overlap_over_both() -> None:
    """By sets of voxels; ignored ones count nowhere; tables of two halves add up."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 4, (6, 5, 4), generator=generator)
    truth[truth < 0] = -100
    called = torch.randint(0, 4, (6, 5, 4), generator=generator)
    counts = confusion(called, truth, 5)
    assert torch.equal(
        counts, confusion(called[:2], truth[:2], 5) + confusion(called[2:], truth[2:], 5)
    )
    told = {i for i in range(truth.numel()) if truth.flatten()[i] >= 0}
    for c, found in enumerate(dice(counts)):
        a = {i for i in told if int(truth.flatten()[i]) == c}
        b = {i for i in told if int(called.flatten()[i]) == c}
        if c == 4:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(2 * len(a & b) / (len(a) + len(b)))


def test_classes_outside_the_list_are_refused() -> None:
    truth = torch.tensor([0, 3])
    with pytest.raises(ShapeError, match=r"from 0 to 3.*\n?.*0 to 2"):
        confusion(torch.tensor([0, 1]), truth, 3)
    with pytest.raises(ShapeError, match="different voxels"):
        confusion(torch.tensor([0]), truth, 4)


def test_the_best_thresholds_are_those_of_exhaustion() -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 12, (300,), generator=generator).float()
    labels = (image + torch.randint(-2, 3, (300,), generator=generator)).div(4).floor()
    labels = labels.clamp(0, 2).long()
    labels[:30] = -100

    def score(pair: Thresholds) -> float:
        return sum(dice(confusion(pair.predict(image), labels, 3))[1:])

    tissues = Tissues(0, 1, 2)
    pairs = [Thresholds(a, b, tissues) for a, b in itertools.combinations(range(13), 2)]
    found = best_thresholds(image, labels, tissues)
    assert score(found) == pytest.approx(max(map(score, pairs)))
    # Held-out voxels have no say, however they are labelled.
    other = image.clone()
    other[:30] = 5.0
    assert best_thresholds(other, labels, tissues) == found


def test_thresholds_tell_the_classes_that_the_store_names() -> None:
    """Whatever their numbers: the same thresholds, and predictions renumbered alike."""
    plain, mixed = ["background", "grey", "white", "other"], ["white", "other", "csf", "grey"]
    assert tissues_of(plain) == (0, 1, 2)
    renumbered = tissues_of(mixed)
    assert renumbered == (1, 3, 0)
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(200, generator=generator)
    labels = (3 * image + 0.3 * torch.randn(200, generator=generator)).long().clamp(0, 2)
    one = best_thresholds(image, labels, Tissues(0, 1, 2))
    two = best_thresholds(image, torch.tensor(renumbered)[labels], renumbered)
    assert one[:2] == two[:2]
    assert torch.equal(torch.tensor(renumbered)[one.predict(image)], two.predict(image))
    for names in (["a", "b", "c"], ["grey", "white"], ["background", "grey", "other"], []):
        assert tissues_of(names) is None


def test_a_montage_is_a_png_of_its_pictures(tmp_path: Path) -> None:
    image = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    labels = np.arange(20).reshape(4, 5) % 4 - 1
    picture = montage([[grey_picture(image), label_picture(labels)], [grey_picture(image)]])
    assert picture.shape == (2 * 6, 2 * 7, 3)
    write_png(tmp_path / "m.png", picture)
    data = (tmp_path / "m.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    size = struct.unpack(">I", data[33:37])[0]
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8)
    lines = lines.reshape(height, 1 + 3 * width)
    assert np.array_equal(lines[:, 1:].reshape(height, width, 3), picture)
    assert picture[0, 0].max() <= 2
    assert picture[3, 4].min() == 255
