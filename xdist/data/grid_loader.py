"""Batches of grids: of each row a rank reads its own part of the sample, or of a crop of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from xdist.data.degrade import Degradation
from xdist.data.grid_box import part_box, require_share
from xdist.data.grid_order import crop_origin, grid_sample
from xdist.data.grid_store import GridSplit
from xdist.data.loader import IGNORED, rows_of
from xdist.errors import DataError
from xdist.grid_shard import GridShard
from xdist.models.vdt_inputs import EXTRA

# The channel of a video's x that says what is known (xdist/models/vdt_inputs.py).
KNOWN = -EXTRA


@dataclass(frozen=True)
class GridRequest:
    """One global batch: the cursor of its first sample; of each row the sample and where the part
    of `sizes` positions starts in it."""

    cursor: int
    samples: tuple[int, ...]
    origins: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @classmethod
    def draw(
        cls, seed: int, cursor: int, batch: int, sizes: Sequence[int], split: GridSplit, *,
        first: int = 0, box: Sequence[int] = (),
    ) -> GridRequest:  # fmt: skip
        """The batch at `cursor`: `batch` samples in the order of `grid_order`, crops in `box`."""
        numbers = range(cursor, cursor + batch)
        samples = tuple(grid_sample(seed, n, split.samples, first=first) for n in numbers)
        origins = tuple(
            crop_origin(seed, n, split.sizes(sample), sizes, box)
            for n, sample in zip(numbers, samples, strict=True)
        )
        return cls(cursor, samples, origins, tuple(sizes))

    @classmethod
    def whole(cls, cursor: int, samples: Sequence[int], sizes: Sequence[int]) -> GridRequest:
        """Whole samples by their number."""
        origin = (0,) * len(sizes)
        return cls(cursor, tuple(samples), (origin,) * len(samples), tuple(sizes))


@dataclass(frozen=True)
class GridBatch:
    """This rank's part of a request: rows of its data rank, its share of the sharded dim.

    Attributes:
        request: what was asked for.
        rows: which rows of the request these are.
        x: float32 `[B, s1..sk, C]`, what the model takes; of video with two channels behind its
            own, `known` (1 where a position does not count) and the diffusion time.
        labels: `[B, s1..sk]` int64 with -100 where none counts, or float32 `[B, s1..sk, C]`, the
            noise of video.
        counts: positions that the loss counts, on this rank, of each row.
        bad: `(row of this batch, why)` for rows that could not be read here. Every sequence rank
            must drop the same rows: agree on them, then call `without`.
    """

    request: GridRequest
    rows: range
    x: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    bad: tuple[tuple[int, str], ...] = ()

    @property
    def valid_tokens(self) -> int:
        """Positions of this rank that the loss counts."""
        return sum(self.counts)

    def without(self, rows: Iterable[int]) -> GridBatch:
        """The same batch with nothing of `rows` (indices into this batch) counted, and zeros in
        place of their values; of video all of them is known, as its loss asks x what counts."""
        dropped = list(rows)
        if not dropped:
            return self
        x, labels = self.x.clone(), self.labels.clone()
        x[dropped] = 0
        if labels.is_floating_point():
            x[dropped, ..., KNOWN] = 1
            labels[dropped] = 0
        else:
            labels[dropped] = IGNORED
        counts = tuple(0 if row in dropped else n for row, n in enumerate(self.counts))
        return replace(self, x=x, labels=labels, counts=counts)


def read_grids(
    split: GridSplit,
    request: GridRequest,
    gshard: GridShard,
    *,
    labelled: bool = True,
    degrade: Degradation | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
) -> GridBatch:
    """Read this rank's part of `request`; only the chunks that it lies in are read.

    Planes beside the part are not read: a layer that reaches over the border gets them from the
    ranks that hold them. Chunks of several planes are read whole (`GridSplit.box_bytes`).

    gshard: of a grid of `request.sizes`; its mesh says which rows and which part are this rank's;
    labelled: with the class of each position; otherwise labels are empty and nothing counts yet.

    Raises:
        GeometryError: the batch does not divide by the data degree.
        DataError: the sharded dim has fewer positions than ranks; a part cannot be read and
            `on_bad` is "stop" (names chunk and sample).
    """
    require_share(gshard, 1)
    mesh, local = gshard.mesh, gshard.local_sizes
    rows = rows_of(len(request.samples), mesh.data_rank, mesh.data_size)
    images = torch.zeros(len(rows), *local, len(split.channels))
    shape = (len(rows), *local) if labelled else (len(rows), 0)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    bad: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        sample = request.samples[row]
        box = part_box(gshard, request.origins[row], split.sizes(sample))
        try:
            images[index] = torch.from_numpy(split.image(sample, box, degrade))
            if labelled:
                labels[index] = torch.from_numpy(split.labels(sample, box))
        except DataError as error:
            name = f"sample {sample} of {split.name}, positions {list(box)}"
            if on_bad == "stop":
                raise DataError(f"{error.what}, needed by {name}", error.why, error.do) from error
            images[index], labels[index] = 0, IGNORED
            bad.append((index, f"{name}: {error.what}"))
    counts = tuple(int((row >= 0).sum()) for row in labels)
    return GridBatch(request, rows, images, labels, counts, tuple(bad))
