"""One safetensors file: written from memory in blocks and hashed on the way, read run by run.

    8 bytes    length of the header, little endian
    header     JSON: {KEY: {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ...}
    body       the elements, row-major, little endian, without gaps

Written here rather than by the safetensors package because that copies a whole file's tensors
first, holding the interpreter's lock; a save in the background must not. Source: the format's own
description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from xdist.checkpoint.manifest import DTYPES, FileEntry, once
from xdist.checkpoint.pieces import Spec
from xdist.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 4 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a file: where in the file its bytes lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(NamedTuple):
    """A file whose size and hash were found right, and what it was at that moment."""

    path: Path
    entries: dict[str, Entry]
    identity: tuple[int, ...]

    def read_into(self, entry: Entry, out: torch.Tensor) -> None:
        """Fill `out` (1-D, contiguous, on the CPU) with an entry's bytes.

        Raises:
            CheckpointError: the file is not the one that was hashed any more.
        """
        with _open(self.path) as file:
            if _identity(file.fileno()) != self.identity:
                raise CheckpointError(f"{self.path.name} changed while it was read")
            file.seek(entry.begin)
            left = _bytes_of(out)
            while len(left):
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{self.path.name} became shorter while it was read")
                left = left[count:]
        if out.dtype == torch.bool and out.view(torch.uint8).gt(1).any():
            raise CheckpointError(f"{self.path.name} holds truth values other than 0 and 1")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """`write_file` of tensors that are there; of any device and strides."""
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return write_file(path, specs, tensors.__getitem__)


def write_file(
    path: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileEntry:
    """Write a new file of mode 0600, not flushed; its size and the sha256 of what was written.

    `read(name)` is called once for each tensor when its turn comes; the largest elements come
    first, so that all are aligned.

    Raises:
        CheckpointError: a dtype that is not allowed.
    """
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        spec = specs[name]
        end = at + spec.count * spec.dtype.itemsize
        dtype, shape = _dtype_name(name, spec.dtype), list(spec.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0):
        head = len(text).to_bytes(8, "little") + text
        digest.update(head)
        _write_all(descriptor, memoryview(head))
        for name in order:
            # On the CPU and contiguous already, this copies nothing.
            view = _bytes_of(read(name).detach().cpu().contiguous().view(-1))
            for start in range(0, len(view), _BLOCK_BYTES):
                block = view[start : start + _BLOCK_BYTES]
                digest.update(block)
                _write_all(descriptor, block)
    return FileEntry(8 + len(text) + at, digest.hexdigest())


def check_file(path: Path, entry: FileEntry) -> TensorFile:
    """Hash a listed file block by block and read its header; no tensor is made.

    Raises:
        CheckpointError: not a regular file, size or sha256 not as promised, or a header that does
            not describe the file exactly (allowed dtypes, shapes that fill their bytes, no gaps).
    """
    name = path.name
    with _open(path) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name} is not a regular file")
        if status.st_size != entry.bytes:
            raise CheckpointError(
                f"{name} size mismatch (want {entry.bytes} bytes, got {status.st_size})"
            )
        digest = hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        if digest.hexdigest() != entry.sha256:
            raise CheckpointError(
                f"{name} sha256 mismatch (want {entry.sha256[:16]}.., "
                f"got {digest.hexdigest()[:16]}..)"
            )
        file.seek(0)
        size = int.from_bytes(file.read(8), "little")
        if size > min(max(entry.bytes - 8, 0), MAX_HEADER_BYTES):
            raise CheckpointError(f"{name} announces a header of {size} bytes")
        entries = _entries(name, file.read(size), 8 + size, entry.bytes)
        return TensorFile(path, entries, _identity(file.fileno()))


def _dtype_name(name: str, dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise CheckpointError(
            f"tensor {name} cannot be saved", f"dtype {dtype}, allowed: {', '.join(DTYPES)}"
        )
    return _NAMES[dtype]


def _entries(name: str, text: bytes, body: int, file_bytes: int) -> dict[str, Entry]:
    """Hold the header against the file before any tensor is made of it."""
    found: dict[str, Entry] = {}
    try:
        header = json.loads(text, object_pairs_hook=once)
        header.pop("__metadata__", None)
        for key, values in header.items():
            begin, end = values["data_offsets"]
            dtype, shape = DTYPES.get(values["dtype"]), values["shape"]
            if dtype is None:
                raise CheckpointError(f"{name} holds {key} of dtype {values['dtype']!r}")
            if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
                raise CheckpointError(f"{name} holds {key} of shape {shape}")
            if math.prod(shape) * dtype.itemsize != end - begin:
                raise CheckpointError(f"{name} holds {key}, whose shape does not fill its bytes")
            found[key] = Entry(dtype, tuple(shape), body + begin, body + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} has no safetensors header", repr(error)) from error
    at = body
    for entry in sorted(found.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            raise CheckpointError(f"{name} has a gap or an overlap at byte {at}")
        at = entry.end
    if at != file_bytes:
        raise CheckpointError(f"{name} holds {file_bytes} bytes, its header describes {at}")
    return found


def _open(path: Path) -> io.FileIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be opened", error.strerror or "") from error
    return io.FileIO(descriptor, "rb")


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _bytes_of(flat: torch.Tensor) -> memoryview:
    assert sys.byteorder == "little", "safetensors is little endian"
    return memoryview(flat.view(torch.uint8).numpy().data)


def _write_all(descriptor: int, block: memoryview) -> None:
    while len(block):
        block = block[os.write(descriptor, block) :]
