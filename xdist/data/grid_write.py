"""Writing a store of grids: written beside its place, hashed, renamed when complete."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from xdist.data.grid_store import NO_CLASS, GridStore
from xdist.data.guard import GRID_DTYPES, MAX_CHUNK_BYTES
from xdist.data.identity import GRID_FORMAT, VERSION, fingerprint
from xdist.data.prepare import put_in_place
from xdist.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 16
_ZSTD_LEVEL = 3

Existing = Literal["error", "keep", "replace"]
Row = tuple[NDArray[Any], NDArray[Any] | None]


@dataclass(frozen=True)
class GridSet:
    """Samples of one size, as they are written.

    Attributes:
        sizes: S1..Sk of every sample.
        samples: how many `rows` gives.
        dtype: of the images, one of uint8, uint16, int16, float32.
        rows: one (image `[S1, ..., Sk, C]`, classes uint8 `[S1, ..., Sk]` or None) a sample; a
            class of 255 counts nowhere.
        offset, scale: per channel; a reader gives `(value - offset) * scale`.
        value_range: per channel, the largest value less the smallest.
        affine: voxel indices to millimetres, 4 x 4.
    """

    sizes: tuple[int, ...]
    samples: int
    dtype: str
    rows: Iterable[Row]
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    value_range: tuple[float, ...]
    affine: list[list[float]] | None = None


@dataclass(frozen=True)
class Contents:
    """What a store is to hold.

    Attributes:
        kind: "volume", "video" or "flow".
        channels, classes: names; without classes no labels are written.
        grids: sets of samples; splits: which of them each split has, by index.
        recipe: what the samples were made from (JSON): a store that is there is kept if its own is
            the same.
        chunk: positions of one chunk along each dim; None takes slabs of `slab_dim`.
        slab_dim: whole chunks are slabs across this dim, the one that is sharded first.
    """

    kind: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    grids: Sequence[GridSet]
    splits: Mapping[str, Sequence[int]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    chunk: tuple[int, ...] | None = None
    slab_dim: int = 0


class PreparedGrids(NamedTuple):
    """What was made, or found."""

    path: Path
    samples: dict[str, int]
    sizes: list[tuple[int, ...]]
    stored_bytes: int
    fingerprint: str
    kept: bool

    def lines(self) -> list[str]:
        """The summary for a person."""
        word = "kept as it is" if self.kept else "written"
        sizes = ", ".join(" x ".join(map(str, one)) for one in self.sizes)
        counts = ", ".join(f"{name} {count}" for name, count in self.samples.items())
        return [
            f"{self.path} {word}: {self.stored_bytes / 1e6:.1f} MB on disk",
            f"  grids of {sizes}; samples: {counts}",
            f"  fingerprint {self.fingerprint}",
        ]


def in_the_way(
    target: Path, existing: Existing, kind: str, recipe: Mapping[str, Any]
) -> PreparedGrids | None:
    """What to return at once because the store is there; None where it is to be written.

    Raises:
        DataError: a store in the way that is to be refused, or that was made otherwise.
    """
    if existing == "replace" or not (target.exists() or target.is_symlink()):
        return None
    if existing == "error":
        raise DataError(
            f"{target} exists", "nothing was written", "replace it, or name another folder"
        )
    facts = GridStore(target).identity["facts"]
    if (facts["kind"], facts["recipe"]) != (kind, dict(recipe)):
        raise DataError(
            f"{target} holds other data than these sources and settings",
            f"it has {facts['kind']} {facts['recipe']}, asked for is {kind} {dict(recipe)}",
            "replace it, or name another folder",
        )
    return describe(target, kept=True)


def write_grids(
    store: str | Path, contents: Contents, *, existing: Existing = "error"
) -> PreparedGrids:
    """Write a store of grids.

    Raises:
        ConfigError: chunks that do not fit the grids.
        DataError: a store in the way; an image or labels of another shape than their set; values
            that are not finite.
    """
    target = Path(store)
    found = in_the_way(target, existing, contents.kind, contents.recipe)
    if found is not None:
        return found
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        beside.chmod(0o750)
        _write(beside, contents)
        put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return describe(target, kept=False)


def describe(target: Path, *, kept: bool) -> PreparedGrids:
    """What a store that was made, or found, holds."""
    store = GridStore(target)
    return PreparedGrids(
        path=target,
        samples={name: store.split(name).samples for name in reversed(store.split_names)},
        sizes=[tuple(one["sizes"]) for one in store.identity["facts"]["grids"].values()],
        stored_bytes=sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        fingerprint=store.fingerprint,
        kept=kept,
    )


def chunk_sizes(
    sizes: Sequence[int], value_bytes: int, chunk: Sequence[int] | None, slab_dim: int
) -> tuple[int, ...]:
    """Positions of one chunk along each dim.

    As asked for, or a slab: whole along the other dims, and as many planes of `slab_dim` as fit 64
    KiB, at least one. A plane beyond what a chunk may hold is halved along its longest dim.

    value_bytes: of one position, all channels.

    Raises:
        ConfigError: a chunk grid that does not match: another number of dims, a size outside 1 to
            the grid's, more than 512 MiB; a slab dim that the grid does not have.
    """
    if not -len(sizes) <= slab_dim < len(sizes):
        raise ConfigError(
            f"slab dim {slab_dim} is no dim of the grid",
            f"it has {len(sizes)}: {tuple(sizes)}",
            "count from 0",
        )
    if chunk is None:
        found = list(sizes)
        plane = [size for dim, size in enumerate(sizes) if dim != slab_dim % len(sizes)]
        found[slab_dim] = min(
            sizes[slab_dim], max(1, CHUNK_BYTES // max(1, prod(plane) * value_bytes))
        )
        while prod(found) * value_bytes > MAX_CHUNK_BYTES:
            longest = max(range(len(found)), key=found.__getitem__)
            found[longest] = -(-found[longest] // 2)
        return tuple(found)
    fits = len(chunk) == len(sizes) and all(1 <= c <= s for c, s in zip(chunk, sizes, strict=True))
    if not fits or prod(chunk) * value_bytes > MAX_CHUNK_BYTES:
        raise ConfigError(
            "the chunk grid does not match the grid",
            f"chunks of {tuple(chunk)} ({prod(chunk) * value_bytes:,} bytes, at most "
            f"{MAX_CHUNK_BYTES:,}) for a grid of {tuple(sizes)}",
            "give one size a dim, from 1 to the grid's; or leave it out: slabs are taken",
        )
    return tuple(chunk)


def _write(folder: Path, contents: Contents) -> None:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    grids = {str(at): _write_set(group, at, contents) for at in range(len(contents.grids))}
    facts: dict[str, Any] = {
        "format": GRID_FORMAT,
        "version": VERSION,
        "kind": contents.kind,
        "channels": list(contents.channels),
        "classes": list(contents.classes),
        "grids": grids,
        "splits": {name: [str(at) for at in held] for name, held in contents.splits.items()},
        "recipe": dict(contents.recipe),
    }
    group.attrs["xdist"] = {
        "format": GRID_FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(facts),
        "facts": facts,
    }


def _write_set(group: zarr.Group, at: int, contents: Contents) -> dict[str, Any]:
    """Write one set of samples; returns its facts (sizes, scale and hashes)."""
    one, channels = contents.grids[at], len(contents.channels)
    value_bytes = channels * GRID_DTYPES[one.dtype]
    chunk = chunk_sizes(one.sizes, value_bytes, contents.chunk, contents.slab_dim)
    shape = (one.samples, *one.sizes)
    arrays = {
        "image": _array(
            group, f"grids/{at}/image", (*shape, channels), (1, *chunk, channels), one.dtype
        )
    }
    if contents.classes:
        arrays["labels"] = _array(group, f"grids/{at}/labels", shape, (1, *chunk), "uint8")
    digests = {part: hashlib.sha256() for part in arrays}
    count = 0
    for row, (image, labels) in enumerate(one.rows):
        parts = {"image": image} | ({"labels": labels} if contents.classes else {})
        for part, values in parts.items():
            _check_values(part, row, values, arrays[part], len(contents.classes))
            whole = np.ascontiguousarray(values, dtype=arrays[part].dtype)
            arrays[part][row] = whole
            digests[part].update(whole.tobytes())
        count = row + 1
    if count != one.samples:
        raise DataError("a set of samples is incomplete", f"{count} of {one.samples} came")
    return {
        "samples": one.samples,
        "sizes": list(one.sizes),
        "dtype": one.dtype,
        "offset": list(one.offset),
        "scale": list(one.scale),
        "range": list(one.value_range),
        "affine": one.affine,
        **{f"{part}_sha256": digest.hexdigest() for part, digest in digests.items()},
    }


def _check_values(part: str, row: int, values: Any, array: zarr.Array, classes: int) -> None:
    want = array.shape[1:]
    if values is None or values.shape != want:
        raise DataError(
            f"sample {row}: its {part} have another shape than the set",
            f"got {None if values is None else values.shape}, want {want}",
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))
        raise DataError(
            f"sample {row}: {len(bad)} values of its {part} are not finite",
            f"the first at {tuple(bad[0].tolist())}",
        )
    if part == "labels" and ((values >= classes) & (values != NO_CLASS)).any():
        raise DataError(
            f"sample {row}: a class outside the list",
            f"class {values[values != NO_CLASS].max()}, {classes} are named",
        )


def _array(
    group: zarr.Group, key: str, shape: Sequence[int], chunks: Sequence[int], dtype: str
) -> zarr.Array:
    """An empty array of the one form that is read back: zstd with a checksum."""
    # Chunks of zeros are written like any other: a chunk that is absent is an error when reading.
    return group.create_array(
        key,
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=dtype,
        compressors=[ZstdCodec(level=_ZSTD_LEVEL, checksum=True)],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
