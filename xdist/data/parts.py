"""Writing one split's tokens in parts that need not know of each other: whole chunks each.

A part is a run of whole chunks. Two parts never touch the same file, so they may be written by
different processes, on any host that shares the folder, in any order. The bytes of the store are
those that one process writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from xdist.data.sources import Source

PART_BYTES = 8 << 20

# Calls a function once for each tuple of arguments, anywhere, and gives the results in order.
Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterable[Any]]
# Elements [start, stop) of a source, checked and as numbers of any integer type.
ReadSlice = Callable[[Source, int, int, int], NDArray[Any]]


class Piece(NamedTuple):
    """Elements `[start, stop)` of a file that has `length` of them."""

    source: Source
    length: int
    start: int
    stop: int


def write_parts(
    folder: Path,
    key: str,
    files: Sequence[Source],
    table: NDArray[np.int64],
    read: ReadSlice,
    each: Each,
    done: Callable[[int], None],
) -> str:
    """Fill the array `key`, which exists, from `files`; the sha256 of what it then holds, hex.

    `table` is cu_seqlens of the files. `done` is told the bytes of each finished part. The hash
    is taken of the array as it is read back, by one more call through `each`.

    Raises:
        DataError: a file changed meanwhile, or holds what `read` refuses.
    """
    chunk = int(zarr.open_array(folder, path=key, mode="r", zarr_format=3).chunks[0])
    step = chunk * max(1, PART_BYTES // chunk)
    total = int(table[-1])
    starts = range(0, total, step)
    parts = [
        (str(folder), key, start, pieces(files, table, start, min(start + step, total)), read)
        for start in starts
    ]
    for written in each(write_part, parts):
        done(written)
    return str(next(iter(each(digest, [(str(folder), key)]))))


def pieces(
    files: Sequence[Source], table: NDArray[np.int64], start: int, stop: int
) -> tuple[Piece, ...]:
    """The pieces of files that positions `[start, stop)` are made of."""
    found = []
    index = int(np.searchsorted(table, start, side="right")) - 1
    while index < len(files) and table[index] < stop:
        low, high = int(table[index]), int(table[index + 1])
        if high > low:
            inside = (max(start, low) - low, min(stop, high) - low)
            found.append(Piece(files[index], high - low, *inside))
        index += 1
    return tuple(found)


def write_part(folder: str, key: str, at: int, parts: Sequence[Piece], read: ReadSlice) -> int:
    """Write one run of whole chunks from position `at` on; the bytes they have."""
    array = _open(folder, key, "r+")
    values = np.concatenate(
        [read(p.source, p.length, p.start, p.stop).astype(array.dtype) for p in parts]
    )
    array[at : at + values.size] = values
    return int(values.nbytes)


def digest(folder: str, key: str) -> str:
    """The sha256 of an array's elements, hex."""
    array = _open(folder, key, "r")
    found = hashlib.sha256()
    step = int(array.chunks[0]) * max(1, PART_BYTES // int(array.chunks[0]))
    for start in range(0, int(array.shape[0]), step):
        found.update(np.asarray(array[start : start + step]).tobytes())
    return found.hexdigest()


def _open(folder: str, key: str, mode: Any) -> zarr.Array:
    # A chunk of zeros is written like any other; an array's metadata do not say so.
    with zarr.config.set({"array.write_empty_chunks": True}):
        return zarr.open_array(folder, path=key, mode=mode, zarr_format=3)
