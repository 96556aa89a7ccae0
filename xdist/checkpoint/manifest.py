"""The manifest: which files a checkpoint consists of, with their sizes and sha256.

    {"format": "xdist-checkpoint", "version": 1, "step": 120,
     "files": {"model-00001.safetensors": {"bytes": 4711, "sha256": "..."}, ..., "state.json": ...},
     "seal": sha256 of all of the above as canonical JSON}

It is written last, so a folder without one is not a checkpoint, and sealed, so a damaged one is
known as such.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xdist.errors import CheckpointError

FORMAT = "xdist-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = 64 << 20
# What a checkpoint may hold, by safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|json)")


class FileEntry(NamedTuple):
    """What the manifest promises of one file."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """A manifest that was read and found in order."""

    step: int
    files: dict[str, FileEntry]

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def render(step: int, files: dict[str, FileEntry]) -> bytes:
    """The manifest as JSON bytes, sealed."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "files": {name: entry._asdict() for name, entry in files.items()},
    }
    return json.dumps(body | {"seal": _seal(body)}, indent=1, sort_keys=True).encode()


def parse(data: bytes, step: int) -> Manifest:
    """Read a manifest of the checkpoint at `step`.

    Raises:
        CheckpointError: not sealed, of another format, version or step, or naming a file that is
            not a plain name in the same folder.
    """
    try:
        body = json.loads(data)
        seal = body.pop("seal")
        wanted = _seal(body)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is not a manifest", repr(error)) from error
    if seal != wanted:
        raise CheckpointError(
            f"{MANIFEST} is damaged", f"seal: want {wanted[:16]}.., got {str(seal)[:16]}.."
        )
    if (body.get("format"), body.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{MANIFEST} is of another format",
            f"{body.get('format')!r} version {body.get('version')!r}, want {FORMAT!r} "
            f"version {VERSION}",
        )
    if body.get("step") != step:
        raise CheckpointError(f"{MANIFEST} is of another step", f"{body.get('step')}, want {step}")
    return Manifest(step, _entries(body.get("files")))


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of a plain file of `folder`; links, devices and files beyond `limit` are refused.

    Size is checked before anything is read.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be opened", error.strerror or "") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name} is not a regular file")
        if status.st_size > limit:
            raise CheckpointError(
                f"{name} size mismatch", f"want at most {limit} bytes, got {status.st_size}"
            )
        return file.read(limit + 1)


def read_entry(folder: Path, name: str, entry: FileEntry) -> bytes:
    """The bytes of a listed file, its size and sha256 as promised."""
    data = read_file(folder, name, entry.bytes)
    if len(data) != entry.bytes:
        raise CheckpointError(f"{name} size mismatch (want {entry.bytes} bytes, got {len(data)})")
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise CheckpointError(
            f"{name} sha256 mismatch (want {entry.sha256[:16]}.., got {found[:16]}..)"
        )
    return data


def _entries(files: Any) -> dict[str, FileEntry]:
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{MANIFEST} lists no {STATE}")
    found = {}
    for name, entry in files.items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(f"{MANIFEST} lists {name!r}", "only plain names are read")
        try:
            size, digest = entry["bytes"], entry["sha256"]
        except (KeyError, TypeError):
            size, digest = None, None
        if type(size) is not int or size < 0 or not isinstance(digest, str) or len(digest) != 64:
            raise CheckpointError(f"{MANIFEST} lists {name} without a size and a sha256")
        found[name] = FileEntry(size, digest)
    return found


def _seal(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
