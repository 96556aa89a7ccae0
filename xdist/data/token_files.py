"""Reading the files of a token store: raw bytes, or token ids of `.npy` files, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdist.data.sources import Source
from xdist.errors import DataError

READ_BYTES = 8 << 20

# From a file and its length in tokens to its tokens.
Reader = Callable[[Source, int], Iterator[NDArray[Any]]]


def parts_of(
    source: Source,
    length: int,
    dtype: np.dtype[Any],
    vocabulary_size: int,
    reader: Reader,
    done: Callable[[int], None],
) -> Iterator[NDArray[Any]]:
    """A file's tokens as a store holds them, part by part, checked. `done` is told the bytes."""
    for part in reader(source, length):
        check_ids(part, source, vocabulary_size)
        yield part.astype(dtype, copy=False)
        done(part.nbytes)


def slice_of(
    reader: Reader, vocabulary_size: int, source: Source, length: int, start: int, stop: int
) -> NDArray[Any]:
    """Elements `[start, stop)` of a file that had `length` of them, checked."""
    if reader is ids_of:
        found = np.asarray(load_ids(source)[start:stop])
    else:
        found = np.fromfile(source.path, dtype=np.uint8, count=stop - start, offset=start)
    now = source.path.stat().st_size if reader is bytes_of else length_of(source, reader)
    if now != length or found.size != stop - start:
        raise DataError(f"{source.path} changed while it was read", f"{now}, it had {length}")
    check_ids(found, source, vocabulary_size)
    return found


def bytes_of(source: Source, length: int) -> Iterator[NDArray[Any]]:
    """The bytes of a file that had `length` of them. Raises DataError where it changed."""
    done = 0
    with source.path.open("rb") as file:
        while block := file.read(READ_BYTES):
            done += len(block)
            yield np.frombuffer(block, dtype=np.uint8)
    if done != length:
        raise DataError(
            f"{source.path} changed while it was read",
            f"{done} bytes, it had {length}",
            "try again",
        )


def ids_of(source: Source, length: int) -> Iterator[NDArray[Any]]:
    """The token ids of a `.npy` file of `length` of them."""
    ids = load_ids(source)
    step = max(1, READ_BYTES // ids.dtype.itemsize)
    for start in range(0, length, step):
        yield np.asarray(ids[start : start + step])


def length_of(source: Source, reader: Reader) -> int:
    """Tokens of a file."""
    return source.size_bytes if reader is bytes_of else int(load_ids(source).shape[0])


def load_ids(source: Source) -> NDArray[Any]:
    """A `.npy` file of token ids, mapped. Raises DataError where it is none."""
    try:
        ids = np.load(source.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{source.path} is not a .npy file of token ids", str(error)) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{source.path} does not hold token ids",
            f"got {getattr(ids, 'dtype', type(ids).__name__)} {getattr(ids, 'shape', '')}",
            "save a 1-D array of integers",
        )
    return ids


def check_ids(ids: NDArray[Any], source: Source, vocabulary_size: int) -> None:
    """Raises DataError where a token is not below the vocabulary size."""
    if ids.size and (int(ids.max()) >= vocabulary_size or int(ids.min()) < 0):
        raise DataError(
            f"{source.path} holds a token outside the vocabulary",
            f"ids from {ids.min()} to {ids.max()}, vocabulary size {vocabulary_size}",
            "raise the vocabulary size, or tokenise again",
        )
