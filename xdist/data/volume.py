"""`xdist prepare volume`: NIfTI files -> a store of grids, image and classes beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xdist.data.grid_write import (
    Contents,
    Existing,
    GridSet,
    PreparedGrids,
    in_the_way,
    write_grids,
)
from xdist.data.guard import GRID_DTYPES
from xdist.data.nifti import Nifti, read_nifti
from xdist.data.volume_labels import Truth, classes_of, named_classes
from xdist.errors import ConfigError, DataError

Normalise = Literal["range", "zscore", "none"]
# Millimetres by which the corners of two files' grids may lie apart.
_SAME_PLACE_MM = 1e-2
# Beyond it float32 has no place for every integer.
_FLOAT32_INTEGERS = 1 << 24


@dataclass(frozen=True)
class Volume:
    """One volume: its channels, and what its voxels are.

    Attributes:
        images: files of one grid, each one channel (4-D: one a last index).
        labels: a label map, integers from 0; or
        maps: probability maps by class name, in the order of the classes.
    """

    images: tuple[str | Path, ...]
    labels: str | Path | None = None
    maps: Mapping[str, str | Path] = field(default_factory=dict)


def prepare_volume(
    volumes: Sequence[Volume],
    store: str | Path,
    *,
    held_out: Sequence[Volume] = (),
    classes: Sequence[str] = (),
    map_scale: float = 1.0,
    normalise: Normalise = "range",
    orientation: str = "RAS",
    reorient: bool = False,
    chunk: Sequence[int] | None = None,
    slab_dim: int = 0,
    existing: Existing = "error",
) -> PreparedGrids:
    """Write volumes as one store of grids: split `train`, and `held_out` where some are.

    Values are stored as measured (uint8, uint16, int16, else float32, which holds integers up to
    2^24); what a reader gives is normalised by the numbers that are stored beside them.

    Args:
        volumes, held_out: each a `Volume`; all with the same number of channels. Sizes may differ.
        store: the folder to make.
        classes: names of the label maps' classes, or none to count them: class0, class1, ...
            Of probability maps the classes are background, their names, and other.
        map_scale: the value of a map that means certain (255 of bytes).
        normalise: "range" to [0, 1] by each channel's smallest and largest value, "zscore" by mean
            and standard deviation of the voxels above the smallest value, or "none".
        orientation, reorient: as `nifti.read_nifti`.
        chunk, slab_dim: as `grid_write.chunk_sizes`.
        existing: what to do with a store that is there: refuse, keep it when it was made from the
            same files with the same settings (else refuse), or replace it.

    Raises:
        ConfigError: settings outside their range; labels and maps at once; nibabel is missing.
        DataError: a file that is damaged or wrongly oriented, grids that differ in shape or place,
            NaN voxels, integers beyond float32, labels that are no classes, a store in the way.
    """
    every = [*volumes, *held_out]
    _check(every, classes, map_scale, normalise)
    read = [_read(one, orientation, reorient) for one in every]
    _same_channels(every, read)
    names = named_classes(read, list(every[0].maps), classes)
    recipe = _recipe(
        read,
        len(held_out),
        {
            "normalise": normalise,
            "map_scale": map_scale,
            "orientation": orientation.upper(),
            "chunk": list(chunk) if chunk is not None else None,
            "slab_dim": slab_dim,
            "classes": names,
        },
    )
    found = in_the_way(Path(store), existing, "volume", recipe)
    if found is not None:
        return found
    grids = [_grid(one, names, map_scale, normalise) for one in read]
    splits = {"train": range(len(volumes))}
    if held_out:
        splits["held_out"] = range(len(volumes), len(every))
    contents = Contents(
        kind="volume",
        channels=tuple(channel_names(every[0], read[0].images)),
        classes=tuple(names),
        grids=grids,
        splits=splits,
        recipe=recipe,
        chunk=tuple(chunk) if chunk is not None else None,
        slab_dim=slab_dim,
    )
    return write_grids(store, contents, existing=existing)


def channel_names(volume: Volume, images: Sequence[Nifti]) -> list[str]:
    """A name for each channel: the file's, with a number where it has several."""
    found = []
    for path, image in zip(volume.images, images, strict=True):
        name = Path(path).name.removesuffix(".gz").removesuffix(".nii")
        count = 1 if image.values.ndim == 3 else image.values.shape[3]
        found += [name] if count == 1 else [f"{name}.{at}" for at in range(count)]
    return found


def _check(
    volumes: Sequence[Volume], classes: Sequence[str], map_scale: float, normalise: str
) -> None:
    if not volumes or not all(one.images for one in volumes):
        raise ConfigError("no volume to write", f"{len(volumes)} given", "name NIfTI files")
    if normalise not in ("range", "zscore", "none"):
        raise ConfigError(
            f"{normalise!r} is no normalisation", "range, zscore and none are", "use one of these"
        )
    if not 0 < map_scale < float("inf"):
        raise ConfigError("map_scale must be above 0", f"got {map_scale}")
    for one in volumes:
        if one.labels is not None and one.maps:
            raise ConfigError(
                "a volume has a label map or probability maps, not both",
                f"{one.labels}; {', '.join(one.maps)}",
            )
        if classes and one.maps:
            raise ConfigError(
                "the maps name the classes", f"classes {list(classes)}", "leave classes out"
            )
        same = (one.labels is None) == (volumes[0].labels is None)
        if not same or list(one.maps) != list(volumes[0].maps):
            raise ConfigError(
                "all volumes of a store have labels, or the same maps, or neither",
                f"{one.images[0]} differs from {volumes[0].images[0]}",
            )


def _same_channels(volumes: Sequence[Volume], read: Sequence[Truth]) -> None:
    counts = [
        len(channel_names(one, truth.images)) for one, truth in zip(volumes, read, strict=True)
    ]
    if len(set(counts)) > 1:
        raise DataError("the volumes of a store have equally many channels", f"these have {counts}")


def _read(volume: Volume, orientation: str, reorient: bool) -> Truth:
    """All files of one volume, on one grid."""

    def load(path: str | Path) -> Nifti:
        return read_nifti(path, orientation=orientation, reorient=reorient)

    images = [load(path) for path in volume.images]
    labels = None if volume.labels is None else load(volume.labels)
    maps = {name: load(path) for name, path in volume.maps.items()}
    for other in [*images[1:], *([labels] if labels else []), *maps.values()]:
        same_grid(images[0], other)
    for other in [*([labels] if labels else []), *maps.values()]:
        if other.values.ndim != 3:
            raise DataError(
                f"{other.path} is not one map", f"shape {other.values.shape}", "give three dims"
            )
    return Truth(images, labels, maps)


def same_grid(first: Nifti, other: Nifti) -> None:
    """Raise where two files are not voxel on voxel: another shape, or another place in space.

    Raises:
        DataError: with both shapes, or with the largest distance of their corners.
    """
    sizes, found = first.values.shape[:3], other.values.shape[:3]
    if sizes != found:
        raise DataError(
            f"{other.path} has another shape than {first.path}",
            f"{found}, want {sizes}",
            "resample it to the image's grid",
        )
    corners = np.array(
        [[i, j, k, 1] for i in (0, sizes[0]) for j in (0, sizes[1]) for k in (0, sizes[2])]
    )
    apart = np.abs((other.affine - first.affine) @ corners.T).max()
    if apart > _SAME_PLACE_MM:
        raise DataError(
            f"{other.path} lies elsewhere in space than {first.path}",
            f"corners of their grids are up to {apart:.3g} mm apart, {_SAME_PLACE_MM} are allowed",
            "resample it to the image's grid, or correct its affine",
        )


def _recipe(read: Sequence[Truth], held_out: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything a store follows from: the files' hashes and the settings."""
    files = [
        {
            "images": [one.sha256 for one in truth.images],
            "labels": truth.labels.sha256 if truth.labels else None,
            "maps": {name: one.sha256 for name, one in truth.maps.items()},
        }
        for truth in read
    ]
    return settings | {"files": files, "held_out": held_out}


def _grid(truth: Truth, names: list[str], map_scale: float, normalise: str) -> GridSet:
    """One volume as it is written."""
    parts = [one.values if one.values.ndim == 4 else one.values[..., None] for one in truth.images]
    image = np.concatenate(parts, axis=-1)
    dtype = _dtype(image)
    if dtype == "float32":
        for one in truth.images:
            _held_exactly(one)
    image = image.astype(dtype)
    labels = classes_of(truth, len(names), map_scale) if names else None
    low, high = (np.asarray(f(image, axis=(0, 1, 2)), dtype=np.float64) for f in (np.min, np.max))
    offset, scale = _scale(image, low, high, normalise)
    return GridSet(
        sizes=tuple(int(size) for size in image.shape[:3]),
        samples=1,
        dtype=image.dtype.name,
        rows=[(image, labels)],
        offset=tuple(offset),
        scale=tuple(scale),
        value_range=tuple((high - low).tolist()),
        affine=truth.images[0].affine.tolist(),
    )


def _dtype(values: NDArray[Any]) -> str:
    """The smallest stored dtype that holds the values exactly, else float32."""
    if values.dtype.kind in "iu" and values.size:
        low, high = int(values.min()), int(values.max())
        for name in (name for name in GRID_DTYPES if name != "float32"):
            if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
                return name
    return "float32"


def _held_exactly(one: Nifti) -> None:
    """Raise where float32 would round integers silently."""
    if one.values.dtype.kind not in "iu":
        return
    low, high = int(one.values.min()), int(one.values.max())
    if max(-low, high) > _FLOAT32_INTEGERS:
        raise DataError(
            f"{one.path} holds integers that a store would round",
            f"{one.values.dtype}, from {low:,} to {high:,}; float32 holds them exactly up to "
            f"{_FLOAT32_INTEGERS:,}",
            "scale them down, or save the file as float32 if rounding is meant",
        )


def _scale(
    image: NDArray[Any], low: NDArray[np.float64], high: NDArray[np.float64], normalise: str
) -> tuple[list[float], list[float]]:
    """Offset and scale of each channel; a constant channel is only shifted."""
    if normalise == "none":
        return [0.0] * low.size, [1.0] * low.size
    offset, width = low, high - low
    if normalise == "zscore":
        channels = np.moveaxis(image, -1, 0)
        inside = [one[one > least] for one, least in zip(channels, low, strict=True)]
        offset = np.array([one.mean(dtype=np.float64) if one.size else 0.0 for one in inside])
        width = np.array([one.std(dtype=np.float64) if one.size else 0.0 for one in inside])
    return offset.tolist(), (1.0 / np.where(width > 0, width, 1.0)).tolist()
