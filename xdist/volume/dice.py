"""Dice per class, from a table of counts that ranks may add up."""

from __future__ import annotations

import torch
from torch import Tensor

from xdist.errors import ShapeError


def confusion(predicted: Tensor, truth: Tensor, classes: int, ignore_index: int = -100) -> Tensor:
    """int64 [classes, classes]: how many voxels of class row were called class column.

    predicted, truth: integers of one shape, in [0, classes); truth may be ignore_index, which
    counts nowhere. Tables of parts of a volume add up to that of the whole.

    Raises:
        ShapeError: other shapes, or a class outside [0, classes).
    """
    if predicted.shape != truth.shape:
        raise ShapeError(
            "predictions and labels are of different voxels",
            f"shapes {tuple(predicted.shape)} and {tuple(truth.shape)}",
        )
    told = truth != ignore_index
    rows, columns = truth[told].long(), predicted[told].long()
    for name, found in (("label", rows), ("prediction", columns)):
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < classes:
            raise ShapeError(
                f"a {name} is no class of this model",
                f"{name}s reach from {int(found.min())} to {int(found.max())}",
                f"classes are 0 to {classes - 1}, ignored voxels {ignore_index}",
            )
    return torch.bincount(rows * classes + columns, minlength=classes**2).view(classes, classes)


def dice(counts: Tensor) -> list[float]:
    """2 |A and B| / (|A| + |B|) of each class, from `confusion`; NaN where neither has a voxel.

    Source: Dice, "Measures of the amount of ecologic association between species" (1945).
    """
    both = 2.0 * counts.diagonal().double()
    either = (counts.sum(0) + counts.sum(1)).double()
    return [float(x) for x in both / either]
