"""The baseline without a model: two intensity thresholds between three tissues.

Below the first a brain's voxel is background or fluid, between them grey, above the second white
matter. They are fitted by exhaustion, on voxels that a model may train on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GREY, WHITE = 1, 2
STEPS = 512


class Thresholds(NamedTuple):
    """`low` and `high` in the image's own unit."""

    low: float
    high: float

    def predict(self, image: Tensor) -> Tensor:
        """int64 labels: 0 below low, grey, white from high on."""
        return (image >= self.low).long() + (image >= self.high).long()


def best_thresholds(image: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Thresholds:
    """The pair with the largest Dice of grey plus Dice of white, over a grid of 512 intensities.

    image: any shape, float; labels: of that shape, grey 1 and white 2; ignore_index counts nowhere.
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

    grey, white = from_edge(truth == GREY), from_edge(truth == WHITE)
    every = from_edge(torch.ones_like(truth, dtype=torch.bool))
    # Rows: the lower edge, columns: the upper one.
    called = every[:, None] - every[None]
    score_grey = 2 * (grey[:, None] - grey[None]) / np.maximum(called + grey[0], 1)
    score_white = 2 * white / np.maximum(every + white[0], 1)
    score = np.where(called >= 0, score_grey + score_white[None], -1.0)
    first, second = np.unravel_index(int(score.argmax()), score.shape)
    return Thresholds(low + step * int(first), low + step * int(second))
