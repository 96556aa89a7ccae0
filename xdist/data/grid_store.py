"""Reading a store of grids (volumes, videos, flows): only the chunks of a box, each one checked.

A store is a zarr v3 group with attributes under `xdist`, and for each set of samples of one size

    grids/G/image   uint8 | uint16 | int16 | float32  [samples, S1, ..., Sk, C]   values as measured
    grids/G/labels  uint8  [samples, S1, ..., Sk]     the class of each position, 255 where none

Both are cut by the same chunk grid. A reader gives `(value - offset) * scale` per channel, float32.
"""

from __future__ import annotations

import hashlib
from copy import copy
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdist.data.degrade import Degradation
from xdist.data.grid_arrays import Box, GridArrays
from xdist.data.head import read_head
from xdist.data.identity import GRID_FORMAT, fingerprint
from xdist.errors import DataError

IGNORED = -100
NO_CLASS = 255
Slab = tuple[int, int, int]
"""A dim, and the positions `[start, stop)` along it."""
COMMANDS = "`xdist prepare volume`, `video` or `flow`"
_REMEDY = f"prepare the store again with {COMMANDS}"


class GridStore:
    """A store made by `xdist prepare volume`, `video` or `flow`, opened for reading.

    Attributes:
        path: the folder.
        identity: `{"fingerprint": hex, "facts": {...}}`, for a checkpoint's state (JSON).
        kind: "volume", "video" or "flow".
        channels, classes: their names; no classes where there are no labels.
        dims: of a grid, without samples and channels.

    Raises:
        DataError: no store there, another format or version, metadata outside the allowed lists.
    """

    def __init__(self, path: str | Path) -> None:
        what = "a store of grids"
        self.path, _, self.identity = read_head(path, (GRID_FORMAT,), what, COMMANDS)
        facts = self.identity["facts"]
        self.kind: str = facts["kind"]
        self.channels: tuple[str, ...] = tuple(facts["channels"])
        self.classes: tuple[str, ...] = tuple(facts["classes"])
        self.dims = len(facts["grids"]["0"]["sizes"])
        self._arrays = GridArrays(self.path, facts)

    @property
    def fingerprint(self) -> str:
        """sha256 over content, sizes, names and recipe, hex."""
        return str(self.identity["fingerprint"])

    def identity_of(self, degrade: Degradation | None) -> dict[str, Any]:
        """The identity of what is read with `degrade`: the store's own where that does nothing."""
        if degrade is None or not degrade.acts:
            return self.identity
        facts = self.identity["facts"] | {"degraded": degrade.facts()}
        return {"fingerprint": fingerprint(facts), "facts": facts}

    @property
    def split_names(self) -> list[str]:
        return sorted(self.identity["facts"]["splits"])

    def split(self, name: str) -> GridSplit:
        """The split `name` ("train", "held_out").

        Raises:
            DataError: there is no such split.
        """
        if name not in self.split_names:
            raise DataError(
                f"{self.path} has no split {name!r}",
                f"it has {', '.join(self.split_names)}",
                "set data.held_out to one of them, or data.slab to a part of the training samples, "
                "or prepare the store with --held-out N (video, flow)",
            )
        return GridSplit(self, name)

    def verify(self) -> None:
        """Read everything and compare it with the recorded hashes.

        Raises:
            DataError: a chunk is missing or damaged, or a hash differs.
        """
        for grid, facts in self.identity["facts"]["grids"].items():
            whole = [(0, size) for size in facts["sizes"]]
            for part in self._arrays.parts:
                digest = hashlib.sha256()
                for row in range(facts["samples"]):
                    digest.update(self._arrays.read(grid, part, row, whole).tobytes())
                want = facts[f"{part}_sha256"]
                if digest.hexdigest() != want:
                    raise DataError(
                        f"array grids/{grid}/{part} is not the one that was prepared",
                        f"want sha256 {want[:16]}.., got {digest.hexdigest()[:16]}..",
                        _REMEDY,
                    )


class GridSplit:
    """One split of a store: `samples` of them, counted over its grids in order."""

    def __init__(self, store: GridStore, name: str) -> None:
        self.name = name
        self.channels, self.classes = store.channels, store.classes
        self._arrays = store._arrays
        self._facts: dict[str, Any] = store.identity["facts"]["grids"]
        self._rows = [
            (grid, row)
            for grid in store.identity["facts"]["splits"][name]
            for row in range(self._facts[grid]["samples"])
        ]
        self._slab: Slab | None = None
        self._inside = False

    def without(self, slab: Slab) -> GridSplit:
        """The same samples, whose labels inside `slab` are -100: what may be trained on.

        Raises:
            DataError: a slab that a sample does not have, or that leaves nothing.
        """
        return self._cut(slab, inside=False)

    def only(self, slab: Slab) -> GridSplit:
        """The same samples, whose labels outside `slab` are -100: what is judged.

        Raises:
            DataError: as `without`.
        """
        return self._cut(slab, inside=True)

    def _cut(self, slab: Slab, *, inside: bool) -> GridSplit:
        dim, start, stop = slab
        for sample in range(self.samples):
            sizes = self.sizes(sample)
            if not (0 <= dim < len(sizes) and 0 <= start < stop <= sizes[dim]) or (
                stop - start == sizes[dim]
            ):
                raise DataError(
                    f"the slab [dim, start, stop] = {list(slab)} does not cut sample {sample}",
                    f"its grid is {sizes}",
                    "name a part of a dim that leaves another part",
                )
        found = copy(self)
        found._slab, found._inside = slab, inside
        return found

    @property
    def samples(self) -> int:
        """How many samples the split has."""
        return len(self._rows)

    @property
    def bytes_read(self) -> int:
        """Decoded bytes read from the disk so far, over all splits of the store: whole chunks."""
        return sum(self._arrays.store.read_bytes.values())

    def sizes(self, sample: int) -> tuple[int, ...]:
        """The grid of one sample."""
        return tuple(self._of(sample)["sizes"])

    def affine(self, sample: int) -> list[list[float]] | None:
        """Voxel indices to millimetres, 4 x 4; None where positions have no place in space."""
        found: list[list[float]] | None = self._of(sample)["affine"]
        return found

    def box_bytes(self, sample: int, box: Box) -> int:
        """Decoded bytes of image and labels that reading a box costs: whole chunks."""
        self._of(sample)
        return self._arrays.cost(self._rows[sample][0], box)

    def image(
        self, sample: int, box: Box, degrade: Degradation | None = None
    ) -> NDArray[np.float32]:
        """The image in a box, float32 `[s1, ..., sk, C]`: degraded if asked for, then normalised.

        A value depends on sample and position alone, not on the box it is read in.

        Raises:
            DataError: outside the grid, or a chunk that is missing or damaged.
        """
        facts = self._of(sample)
        grid, row = self._rows[sample]
        found = self._arrays.read(grid, "image", row, box).astype(np.float32)
        if degrade is not None:
            number = self._first[grid] + row
            start = [run[0] for run in box]
            found = degrade.apply(found, number, facts["sizes"], start, facts["range"])
        offset, scale = (np.asarray(facts[key], dtype=np.float32) for key in ("offset", "scale"))
        found -= offset
        found *= scale
        return found

    def labels(self, sample: int, box: Box) -> NDArray[np.int64]:
        """The class of each position of a box, int64 `[s1, ..., sk]`, -100 where none counts.

        Raises:
            DataError: as `image`; a store without labels; a class that it does not have.
        """
        if not self.classes:
            raise DataError("this store has no labels", f"split {self.name}", _REMEDY)
        self._of(sample)
        grid, row = self._rows[sample]
        found = self._arrays.read(grid, "labels", row, box).astype(np.int64)
        found[found == NO_CLASS] = IGNORED
        if found.size and found.max() >= len(self.classes):
            raise DataError(
                f"array grids/{grid}/labels holds a class outside the list",
                f"class {found.max()} of {len(self.classes)}: {', '.join(self.classes)}",
                _REMEDY,
            )
        if self._slab is not None:
            dim, start, stop = self._slab
            at = np.arange(*box[dim])
            hidden = ((at >= start) & (at < stop)) != self._inside
            found[(slice(None),) * dim + (hidden,)] = IGNORED
        return found

    @cached_property
    def _first(self) -> dict[str, int]:
        """The number of each grid's first sample, counted over the whole store."""
        counts = [0, *accumulate(facts["samples"] for facts in self._facts.values())]
        return dict(zip(self._facts, counts, strict=False))

    def _of(self, sample: int) -> dict[str, Any]:
        if not 0 <= sample < self.samples:
            raise DataError(
                f"split {self.name} has no sample {sample}", f"it has {self.samples} of them"
            )
        found: dict[str, Any] = self._facts[self._rows[sample][0]]
        return found
