"""The arrays of a store of grids, read box by box, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from xdist.data.guard import GRID_DTYPES, GuardedStore
from xdist.errors import DataError

_REMEDY = "prepare the store again with `xdist prepare volume`, `video` or `flow`"

Box = Sequence[tuple[int, int]]
"""Positions `[start, stop)` along each dim of a grid."""


class GridArrays:
    """Images, and labels where there are classes; only arrays whose metadata were checked."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.store = GuardedStore(path)
        self.parts = ("image", "labels") if facts["classes"] else ("image",)
        self._arrays: dict[str, Any] = {}
        for grid, one in facts["grids"].items():
            self._open(grid, one, len(facts["channels"]))

    def _open(self, grid: str, facts: dict[str, Any], channels: int) -> None:
        """Check one set of samples: shapes as recorded, both arrays cut by the same chunk grid."""
        shape = (facts["samples"], *facts["sizes"])
        wanted = {"image": (*shape, channels), "labels": shape}
        for part in self.parts:
            key = f"grids/{grid}/{part}"
            dtypes = GRID_DTYPES if part == "image" else {"uint8": 1}
            found = self.store.expect(key, len(wanted[part]), dtypes)
            if found.shape != wanted[part]:
                raise DataError(
                    f"array {key} changed after it was prepared",
                    f"shape {found.shape}, want {wanted[part]}",
                    _REMEDY,
                )
            self._arrays[key] = zarr.open_array(self.store, path=key, mode="r", zarr_format=3)
        cuts = {part: self.store.facts[f"grids/{grid}/{part}"].chunks for part in self.parts}
        if cuts["image"][:-1] != cuts.get("labels", cuts["image"][:-1]):
            raise DataError(
                f"the chunk grids of grids/{grid} do not match",
                f"image {cuts['image'][:-1]}, labels {cuts['labels']}: a slab would not be whole "
                "chunks of both",
                _REMEDY,
            )

    def cost(self, grid: str, box: Box) -> int:
        """Decoded bytes of the chunks that a box touches, of image and labels."""
        found = 0
        for part in self.parts:
            facts = self.store.facts[f"grids/{grid}/{part}"]
            touched = [
                -(-stop // size) - start // size if stop > start else 0
                for (start, stop), size in zip(box, facts.chunks[1:], strict=False)
            ]
            found += prod(touched) * facts.chunk_bytes
        return found

    def read(self, grid: str, part: str, row: int, box: Box) -> NDArray[Any]:
        """The values of one sample in a box, as stored.

        Raises:
            DataError: outside the grid, a chunk missing or damaged.
        """
        key = f"grids/{grid}/{part}"
        facts, array = self.store.facts[key], self._arrays[key]
        sizes = facts.shape[1 : len(box) + 1]
        fits = all(0 <= a <= b <= size for (a, b), size in zip(box, sizes, strict=False))
        if not fits or len(box) != (len(facts.shape) - (2 if part == "image" else 1)):
            raise DataError(
                f"positions {[tuple(run) for run in box]} are not in array {key}",
                f"its grid is {facts.shape[1:]}",
            )
        tail = facts.shape[len(box) + 1 :]
        out = np.empty((*(stop - start for start, stop in box), *tail), dtype=array.dtype)
        for chunk, at in _chunks(box, facts.chunks[1:]):
            into = tuple(slice(a - box[d][0], b - box[d][0]) for d, (a, b) in enumerate(at))
            name = "/".join(map(str, (row // facts.chunks[0], *chunk, *(0 for _ in tail))))
            out[into] = self._one(key, name, (row, *(slice(a, b) for a, b in at)))
        return out

    def _one(self, key: str, name: str, where: tuple[Any, ...]) -> NDArray[Any]:
        """A part of one chunk, so that an error names the chunk it comes from."""
        seen_bytes = self.store.read_bytes[key]
        try:
            found = self._arrays[key][where]
        except DataError:
            raise
        # Codecs raise whatever they like; each means that the chunk cannot be decoded.
        except Exception as error:
            raise DataError(
                f"chunk {key}/c/{name} of array {key} is damaged",
                f"{type(error).__name__}: {error}",
                _REMEDY,
            ) from error
        if self.store.read_bytes[key] == seen_bytes:
            raise DataError(
                f"zarr {zarr.__version__} read chunk {key}/c/{name} past its checks",
                f"codec pipeline {zarr.config.get('codec_pipeline.path')}",
                "keep zarr's default codec pipeline (BatchedCodecPipeline)",
            )
        return np.asarray(found)


def _chunks(box: Box, sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Every chunk that a box touches, with the part of the box inside it."""
    runs = [
        [
            (at, (max(start, at * size), min(stop, (at + 1) * size)))
            for at in range(start // size, -(-stop // size))
            if stop > start
        ]
        for (start, stop), size in zip(box, sizes, strict=False)
    ]
    for one in product(*runs):
        yield tuple(at for at, _ in one), [run for _, run in one]
