"""The baseline without a model: two intensity thresholds between three tissues.

Below the first a brain's voxel is background or fluid, between them grey, above the second white
matter. They are fitted by exhaustion, on voxels that a model may train on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STEPS = 512


class Tissues(NamedTuple):
    """The number of each class that thresholds tell apart."""

    below: int
    grey: int
    white: int


class Thresholds(NamedTuple):
    """`low` and `high` in the image's own unit, and what lies below, between and above them."""

    low: float
    high: float
    tissues: Tissues

    def predict(self, image: Tensor) -> Tensor:
        """int64 labels: the class below low, grey, white from high on."""
        steps = (image >= self.low).long() + (image >= self.high).long()
        return torch.tensor(self.tissues, device=image.device)[steps]


def tissues_of(classes: Sequence[str]) -> Tissues | None:
    """Where a store's classes name `grey` and `white`, and the first of the others; None where
    one of the three is missing."""
    others = [at for at, name in enumerate(classes) if name not in ("grey", "white")]
    if not others or not {"grey", "white"} <= set(classes):
        return None
    return Tissues(others[0], classes.index("grey"), classes.index("white"))


def best_thresholds(
    image: Tensor, labels: Tensor, tissues: Tissues, *, ignore_index: int = -100
) -> Thresholds:
    """The pair with the largest Dice of grey plus Dice of white, over a grid of 512 intensities.

    image: any shape, float; labels: of that shape, classes as `tissues` numbers them; ignore_index
    counts nowhere.
    """
    told = labels != ignore_index
    values, truth = image[told].double(), labels[told]
    low, high = float(values.min()), float(values.max())
    step = (high - low) / STEPS or 1.0
    bins = ((values - low) / step).long().clamp_(max=STEPS - 1)

    def from_edge(of: Tensor) -> NDArray[np.int64]:
        """Voxels at or above each of the STEPS + 1 edges."""
        counts = torch.bincount(bins[of], minlength=STEPS).numpy()
        return np.concatenate([counts[::-1].cumsum()[::-1], [0]])

    grey, white = from_edge(truth == tissues.grey), from_edge(truth == tissues.white)
    every = from_edge(torch.ones_like(truth, dtype=torch.bool))
    # Rows: the lower edge, columns: the upper one.
    called = every[:, None] - every[None]
    score_grey = 2 * (grey[:, None] - grey[None]) / np.maximum(called + grey[0], 1)
    score_white = 2 * white / np.maximum(every + white[0], 1)
    score = np.where(called >= 0, score_grey + score_white[None], -1.0)
    first, second = np.unravel_index(int(score.argmax()), score.shape)
    return Thresholds(low + step * int(first), low + step * int(second), tissues)
