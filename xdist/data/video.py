"""Procedural video: shapes that fly straight and bounce off the walls, each by a known law.

A sample is a pure function of (seed, split, its number): integers by counter, then sums, products
and square roots, so that every machine makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xdist.data.draw import draws
from xdist.data.grid_write import Contents, Existing, GridSet, PreparedGrids, Row, write_grids
from xdist.errors import ConfigError

STREAMS = {"train": 0, "held_out": 1}
_STREAM = 0x76696465
# Words of a shape: kind, radius, two places, two velocities; then one a channel.
_WORDS = 6


class Shapes(NamedTuple):
    """What flies in one sample: arrays of one entry a shape.

    disc: bool, else a square. radius: half the width, pixels. start: place of the centre at frame
    0, and velocity: pixels a frame, both [shapes, 2], (row, column). colour: [shapes, channels],
    from 0.4 to 1.
    """

    disc: NDArray[np.bool_]
    radius: NDArray[np.float64]
    start: NDArray[np.float64]
    velocity: NDArray[np.float64]
    colour: NDArray[np.float64]


@dataclass(frozen=True)
class Bouncing:
    """The settings of bouncing shapes: samples `[frames, height, width, channels]`, uint8.

    Raises:
        ConfigError: no frame or shape, frames below 8 x 8, or a bad seed.
    """

    frames: int = 16
    height: int = 32
    width: int = 32
    channels: int = 1
    shapes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.frames, self.channels, self.shapes)
        if min(counts) < 1 or min(self.height, self.width) < 8 or not 0 <= self.seed < 1 << 63:
            raise ConfigError(
                "bouncing shapes cannot be drawn",
                f"{self}",
                "use at least 1 frame, channel and shape, frames of 8 x 8 or more, and a seed of "
                "63 bits",
            )

    def law(self, sample: int, split: str = "train") -> Shapes:
        """Kinds, sizes, places at frame 0 and velocities of a sample's shapes."""
        width = _WORDS + self.channels
        stream = _STREAM + STREAMS[split]
        words = draws(self.seed, stream, np.array([sample]), self.shapes * width)
        parts = words.reshape(self.shapes, width).astype(np.float64) / 2.0**32
        least = min(self.height, self.width)
        radius = least * (0.1 + 0.1 * parts[:, 1])
        walls = np.array([self.height, self.width]) - 2.0 * radius[:, None]
        return Shapes(
            disc=parts[:, 0] < 0.5,
            radius=radius,
            start=radius[:, None] + walls * parts[:, 2:4],
            velocity=least * 0.15 * (2.0 * parts[:, 4:6] - 1.0),
            colour=0.4 + 0.6 * parts[:, _WORDS:],
        )

    def places(self, shapes: Shapes, frame: float) -> NDArray[np.float64]:
        """The centres at a frame, [shapes, 2]: the law.

        Along each axis a centre moves between radius and length - radius as if in a hall of
        mirrors: straight on through copies of the room, every other one mirrored.
        """
        room = np.array([self.height, self.width]) - 2.0 * shapes.radius[:, None]
        way = (shapes.start - shapes.radius[:, None] + shapes.velocity * frame) % (2.0 * room)
        return shapes.radius[:, None] + np.where(way <= room, way, 2.0 * room - way)

    def make(self, sample: int, split: str = "train") -> NDArray[np.uint8]:
        """One sample, uint8 `[frames, height, width, channels]`; where shapes overlap, the brighter
        one shows. Pixel (i, j) has its centre at (i + 0.5, j + 0.5); edges are one pixel soft."""
        shapes = self.law(sample, split)
        rows = np.arange(self.height)[:, None] + 0.5
        columns = np.arange(self.width)[None] + 0.5
        found = np.zeros((self.frames, self.height, self.width, self.channels), dtype=np.uint8)
        for frame in range(self.frames):
            for at, (row, column) in enumerate(self.places(shapes, frame)):
                away = np.abs(rows - row), np.abs(columns - column)
                if shapes.disc[at]:
                    distance = np.sqrt(away[0] * away[0] + away[1] * away[1])
                else:
                    distance = np.maximum(*np.broadcast_arrays(*away))
                cover = np.clip(shapes.radius[at] + 0.5 - distance, 0.0, 1.0)
                drawn = np.floor(255.0 * cover[..., None] * shapes.colour[at] + 0.5)
                np.maximum(found[frame], drawn.astype(np.uint8), out=found[frame])
        return found


def prepare_video(
    bouncing: Bouncing,
    store: str | Path,
    *,
    samples: int,
    held_out: int = 0,
    existing: Existing = "error",
) -> PreparedGrids:
    """Write videos as a store of grids (frames, rows, columns); a reader gives -1 to 1.

    Raises:
        ConfigError: no samples.
        DataError: a store in the way.
    """
    counts = {"train": samples, "held_out": held_out}
    check_counts(samples, held_out)
    sizes = (bouncing.frames, bouncing.height, bouncing.width)

    def rows(split: str) -> Iterator[Row]:
        return ((bouncing.make(at, split), None) for at in range(counts[split]))

    splits = [name for name, count in counts.items() if count]
    contents = Contents(
        kind="video",
        channels=tuple(f"colour{at}" for at in range(bouncing.channels)),
        classes=(),
        grids=[
            GridSet(
                sizes=sizes,
                samples=counts[name],
                dtype="uint8",
                rows=rows(name),
                offset=(127.5,) * bouncing.channels,
                scale=(1 / 127.5,) * bouncing.channels,
                value_range=(255.0,) * bouncing.channels,
            )
            for name in splits
        ],
        splits={name: [at] for at, name in enumerate(splits)},
        recipe={"made": "bouncing", "samples": counts} | asdict(bouncing),
    )
    return write_grids(store, contents, existing=existing)


def check_counts(samples: int, held_out: int) -> None:
    """Raise ConfigError where there is nothing to train on."""
    if samples < 1 or held_out < 0:
        raise ConfigError(
            "a store needs a sample to train on", f"samples = {samples}, held_out = {held_out}"
        )
