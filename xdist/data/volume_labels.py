"""Classes of voxels: from a label map, or from probability maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xdist.data.grid_store import NO_CLASS
from xdist.data.nifti import Nifti
from xdist.errors import ConfigError, DataError

BACKGROUND, OTHER = "background", "other"


class Truth(NamedTuple):
    """The files of one volume: channels, and a label map or maps by class name, or neither."""

    images: list[Nifti]
    labels: Nifti | None
    maps: dict[str, Nifti]


def named_classes(read: Sequence[Truth], maps: list[str], given: Sequence[str]) -> list[str]:
    """The names of the classes of a store, [] without labels.

    Raises:
        ConfigError: more names than a byte tells apart.
        DataError: a label map with a value that is no class.
    """
    named = [BACKGROUND, *maps, OTHER] if maps else list(given)
    if len(named) > NO_CLASS:
        raise ConfigError(
            "too many classes",
            f"{len(named)} are named; a store keeps one byte a voxel, so {NO_CLASS} at most "
            f"({NO_CLASS} itself is no class)",
            "join some of them",
        )
    if maps:
        return named
    labels = [truth.labels for truth in read if truth.labels is not None]
    if not labels:
        return []
    highest = 0
    for one in labels:
        values = one.values
        if values.dtype.kind == "f" and (values != np.round(values)).any():
            raise DataError(
                f"{one.path} is no label map",
                f"it holds fractions, up to {values.max():.4g}",
                "give integers, or say that it is a probability map: --map NAME=FILE",
            )
        low, high = int(values.min()), int(values.max())
        most = len(given) - 1 if given else NO_CLASS - 1
        if low < 0 or high > most:
            raise DataError(
                f"{one.path} holds labels that are no classes",
                f"from {low} to {high}; classes go from 0 to {most}",
                "name every class with --classes, or renumber the labels",
            )
        highest = max(highest, high)
    return list(given) or [f"class{at}" for at in range(highest + 1)]


def classes_of(truth: Truth, classes: int, map_scale: float) -> NDArray[np.uint8]:
    """The class of each voxel, uint8.

    Of maps: background where the first channel is at its smallest value (outside a skull-stripped
    brain) and no map claims half of the voxel; else the largest of the maps and of what they leave
    (other), the earlier one where two are equal.

    Raises:
        DataError: maps outside [0, map_scale], or that add up to more than 1.
    """
    if truth.labels is not None:
        return truth.labels.values.astype(np.uint8)
    shares = [_shares(one, map_scale) for one in truth.maps.values()]
    claimed = np.sum(shares, axis=0, dtype=np.float32)
    most = float(claimed.max())
    # Each map may be rounded to a step of a byte.
    if most > 1.0 + 0.5 * len(shares) / 255:
        at = tuple(int(i) for i in np.unravel_index(int(claimed.argmax()), claimed.shape))
        raise DataError(
            "the probability maps add up to more than 1",
            f"{most:.4f} at voxel {at}",
            "give maps of classes that exclude each other",
        )
    first: Any = truth.images[0].values
    first = first[..., 0] if first.ndim == 4 else first
    outside = (first == first.min()) & (np.max(shares, axis=0) < 0.5)
    found = 1 + np.argmax([*shares, 1.0 - claimed], axis=0)
    return np.where(outside, 0, found).astype(np.uint8)


def _shares(one: Nifti, map_scale: float) -> NDArray[np.float32]:
    low, high = float(one.values.min()), float(one.values.max())
    if low < 0 or high > map_scale * (1 + 1e-6):
        raise DataError(
            f"{one.path} is no map of probabilities",
            f"its values go from {low:.4g} to {high:.4g}, certain is {map_scale:.4g}",
            f"say what certain is: --map-scale {high:.4g}",
        )
    return one.values.astype(np.float32) / np.float32(map_scale)
