"""A picture of planes side by side: image, truth, prediction. PNG by the standard library alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Background black; grey, white, other in colours that differ in lightness too.
PALETTE = np.array(
    [(0, 0, 0), (86, 132, 178), (245, 240, 225), (214, 96, 77), (120, 180, 90), (160, 100, 180)],
    dtype=np.uint8,
)
GAP = 2


def grey_picture(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[H, W] as RGB [H, W, 3], from its 1st to its 99.5th percentile."""
    low, high = np.percentile(image, (1.0, 99.5))
    scaled = np.clip((image - low) / max(float(high - low), 1e-12), 0.0, 1.0) * 255.0
    return np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=-1)


def label_picture(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """[H, W] classes as RGB [H, W, 3]; what is below 0 is background."""
    found: NDArray[np.uint8] = PALETTE[np.maximum(labels, 0) % len(PALETTE)]
    return found


def montage(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Pictures [H, W, 3] in rows and columns, a gap between them; smaller ones at the top left."""
    height = max(one.shape[0] for row in rows for one in row) + GAP
    width = max(one.shape[1] for row in rows for one in row) + GAP
    found = np.full((height * len(rows), width * max(map(len, rows)), 3), 40, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            top, left = i * height, j * width
            found[top : top + one.shape[0], left : left + one.shape[1]] = one
    return found


def write_png(path: str | Path, picture: NDArray[np.uint8]) -> None:
    """RGB [H, W, 3] as a PNG file (ISO/IEC 15948: 8 bits a colour, no filter, one stream)."""
    height, width, _ = picture.shape
    lines = np.concatenate(
        [np.zeros((height, 1), np.uint8), picture.reshape(height, width * 3)], axis=1
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(lines.tobytes(), 6)),
            (b"IEND", b""),
        ):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))
