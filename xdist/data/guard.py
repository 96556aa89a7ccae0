"""What a store must look like before a byte of it is trusted, checked without decoding anything.

zarr reads a missing chunk as zeros, opens whatever codec the metadata name, and allocates what a
compressed chunk says it holds. A store is input like any other: metadata are held against short
lists first, every chunk is checked on its way from the disk to the codec.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from xdist.errors import DataError

CODECS = frozenset({"bytes", "zstd"})
DTYPES = {"uint8": 1, "uint16": 2, "uint32": 4, "int64": 8}
# Values of grids: volumes come as signed integers or fractions too.
GRID_DTYPES = {"uint8": 1, "uint16": 2, "int16": 2, "float32": 4}
MAX_CHUNK_BYTES = 512 << 20
MAX_ELEMENTS = 1 << 48
_MAX_METADATA_BYTES = 16 << 20
_CHUNK_KEY = re.compile(r"(?P<array>.+?)/c(?:/\d+)+")
_REMEDY = (
    "prepare the store again with the command that made it: `xdist prepare text`, `task`, "
    "`volume`, `video` or `flow`"
)


class ArrayFacts(NamedTuple):
    """What an array's metadata promise: its shape, that of a chunk, bytes of an element."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    item_bytes: int

    @property
    def length(self) -> int:
        """Elements along the first dim: all of them in a 1-D array."""
        return self.shape[0]

    @property
    def chunk_length(self) -> int:
        """Elements of a chunk along the first dim."""
        return self.chunks[0]

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.item_bytes


def read_metadata(root: Path, key: str, node_type: str) -> dict[str, Any]:
    """The `zarr.json` of the group or array at `key` ("" is the root), format 3 only."""
    path = root / key / "zarr.json"
    inside(root, path)
    try:
        size = path.stat().st_size
        if size > _MAX_METADATA_BYTES:
            raise DataError(f"{path} is too large for metadata", f"{size} bytes", _REMEDY)
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"no zarr {node_type} at {path.parent}", f"{path} is missing", _REMEDY
        ) from (None)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read", str(error), _REMEDY) from error
    if not isinstance(found, dict) or found.get("zarr_format") != 3:
        raise DataError(f"{path} is not zarr format 3", "only format 3 is read", _REMEDY)
    if found.get("node_type") != node_type:
        raise DataError(f"{path} is not a zarr {node_type}", f"{found.get('node_type')}", _REMEDY)
    return found


def check_array(
    root: Path, key: str, dims: int = 1, dtypes: Mapping[str, int] = DTYPES
) -> ArrayFacts:
    """Hold the metadata of the array at `key` against the allowed codecs, dtypes and sizes."""
    found = read_metadata(root, key, "array")
    try:
        shape = tuple(found["shape"])
        dtype = found["data_type"]
        grid = found["chunk_grid"]["name"]
        chunks = tuple(found["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = [codec["name"] for codec in found["codecs"]]
        checksum = [codec.get("configuration", {}).get("checksum") for codec in found["codecs"]]
        keys = found["chunk_key_encoding"]
        separator = keys.get("configuration", {}).get("separator", "/")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"the metadata of array {key} are not as expected", repr(error), _REMEDY
        ) from (error)
    problems = []
    if dtype not in dtypes:
        problems.append(f"dtype {dtype!r}, allowed: {', '.join(dtypes)}")
    if codecs != ["bytes", "zstd"] or checksum[-1] is not True:
        problems.append(f"codecs {codecs}, allowed: bytes then zstd with a checksum")
    if found.get("storage_transformers"):
        problems.append("storage transformers, allowed: none")
    if grid != "regular" or (keys.get("name"), separator) != ("default", "/"):
        problems.append("chunks must be a regular grid with keys c/0, c/1, ...")
    if not _counts(shape, dims, 0) or not _counts(chunks, dims, 1):
        problems.append(f"shape {_plain(shape)}, chunk shape {_plain(chunks)}, of {dims} dims")
    elif math.prod(chunks) * dtypes.get(dtype, 1) > MAX_CHUNK_BYTES:
        problems.append(f"chunks of {math.prod(chunks)} elements, allowed: {MAX_CHUNK_BYTES} bytes")
    if problems:
        raise DataError(f"array {key} is refused", "; ".join(problems), _REMEDY)
    return ArrayFacts(shape, chunks, dtypes[dtype])


def inside(root: Path, path: Path) -> None:
    """Raise when a link leads `path` out of the store."""
    if not path.resolve().is_relative_to(root):
        raise DataError(
            f"{path} leads out of the store", f"to {path.resolve()}", "links are not followed"
        )


class GuardedStore(LocalStore):
    """A read-only local store that refuses chunks that are missing, linked away or malformed.

    `read_bytes` counts decoded bytes by array, as they come from the disk. All reads of a process
    run on zarr's one event loop, so the counts need no lock.
    """

    def __init__(self, root: Path | str, *, read_only: bool = True) -> None:
        super().__init__(Path(root).resolve(), read_only=True)
        self.facts: dict[str, ArrayFacts] = {}
        self.read_bytes: dict[str, int] = {}

    def expect(self, key: str, dims: int = 1, dtypes: Mapping[str, int] = DTYPES) -> ArrayFacts:
        """Check the array at `key`; only arrays that were checked can be read."""
        self.facts[key] = check_array(self.root, key, dims, dtypes)
        self.read_bytes[key] = 0
        return self.facts[key]

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        match = _CHUNK_KEY.fullmatch(key)
        if match is None:
            return await super().get(key, prototype, byte_range)
        array = match["array"]
        chunk_bytes = self.facts[array].chunk_bytes
        path = self.root / key
        inside(self.root, path)
        if path.exists() and path.stat().st_size > chunk_bytes + chunk_bytes // 64 + 1024:
            raise DataError(
                f"chunk {key} is refused", "its file is larger than its content", _REMEDY
            )
        value = await super().get(key, prototype, byte_range)
        if value is None:
            raise DataError(
                f"chunk {key} is missing", f"array {array} needs the file {path}", _REMEDY
            )
        problem = zstd_problem(value.to_bytes(), chunk_bytes)
        if problem:
            raise DataError(f"chunk {key} of array {array} is damaged", problem, _REMEDY)
        self.read_bytes[array] += chunk_bytes
        return value


def zstd_problem(data: bytes, content_bytes: int) -> str:
    """Why `data` is not one checksummed zstd frame of `content_bytes`; "" when it is (RFC 8878).

    Reads the frame header and steps over the blocks, so that a chunk that would decode to more
    than its array allows is refused before the codec allocates for it.
    """
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        return "not a zstd frame"
    descriptor = data[4]
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    size_flag = descriptor >> 6
    size_bytes = (single, 2, 4, 8)[size_flag]
    content = int.from_bytes(data[at : at + size_bytes], "little") + (256 if size_flag == 1 else 0)
    if not size_bytes or content != content_bytes:
        return f"its frame announces {content if size_bytes else 'no'} bytes, want {content_bytes}"
    if not checksum:
        return "its frame carries no checksum"
    at += size_bytes
    last = decoded = 0
    while not last:
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        # What a raw block, or one repeated byte, decodes to is written in it.
        decoded += size if kind < 2 else 0
        at += 3 + (1 if kind == 1 else size)
        if at > len(data):
            return f"truncated: {len(data)} bytes"
    if decoded > content_bytes:
        return f"it would decode to {decoded} bytes, want {content_bytes}"
    if at + 4 != len(data):
        return f"{len(data)} bytes, its frame ends at {at + 4}"
    return ""


def _counts(sizes: tuple[Any, ...], dims: int, least: int) -> bool:
    """Whether these are the sizes of so many dims, each from `least` to what may be allocated."""
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    return (
        len(sizes) == dims
        and whole
        and all(size >= least for size in sizes)
        and math.prod(sizes) <= MAX_ELEMENTS
    )


def _plain(sizes: tuple[Any, ...]) -> str:
    return repr(sizes[0]) if len(sizes) == 1 else repr(sizes)
