"""The manifest: which files a checkpoint consists of, and which runs of which tensor lie where.

    {"format": "xdist-checkpoint", "version": 2, "step": 120,
     "files": {"rank-00000-model-00001.safetensors": {"bytes": 4711, "sha256": "..."}, ...},
     "tensors": {"model/head": {"shape": [256, 96], "dtype": "F32",
                                "runs": [[0, 12288, "rank-00000-model-00001.safetensors"], ...]}},
     "seal": sha256 of all of the above as canonical JSON}

A run is [index of its first element in the flattened tensor, elements, file]; the runs of a tensor
hold each of its elements once. Version 1, still read, has no "tensors": its files hold them whole.
The manifest is written last, so a folder without one is not a checkpoint, and sealed, so a damaged
one is known as such.
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

from xdist.checkpoint.pieces import Spec
from xdist.errors import CheckpointError

FORMAT = "xdist-checkpoint"
VERSION = 2
VERSIONS = (1, 2)
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = 64 << 20
MAX_MANIFEST_BYTES = 256 << 20
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


class Run(NamedTuple):
    """Elements `[start, start + length)` of a flattened tensor, and the file they are in."""

    start: int
    length: int
    file: str

    @property
    def stop(self) -> int:
        return self.start + self.length


class Tensor(NamedTuple):
    """A whole tensor and its runs, in order."""

    spec: Spec
    runs: tuple[Run, ...]


class Manifest(NamedTuple):
    """A manifest that was read and found in order; `tensors` is None in version 1."""

    step: int
    files: dict[str, FileEntry]
    tensors: dict[str, Tensor] | None = None

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def render(
    step: int, files: dict[str, FileEntry], tensors: dict[str, Tensor] | None = None
) -> bytes:
    """The manifest as JSON bytes, sealed; version 1 without `tensors`."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": 1 if tensors is None else VERSION,
        "step": step,
        "files": {name: entry._asdict() for name, entry in files.items()},
    }
    if tensors is not None:
        names = {dtype: name for name, dtype in DTYPES.items()}
        body["tensors"] = {
            name: {
                "shape": list(tensor.spec.shape),
                "dtype": names[tensor.spec.dtype],
                "runs": [list(run) for run in tensor.runs],
            }
            for name, tensor in tensors.items()
        }
    return json.dumps(body | {"seal": _seal(body)}, sort_keys=True).encode()


def parse(data: bytes, step: int) -> Manifest:
    """Read a manifest of the checkpoint at `step`.

    Raises:
        CheckpointError: not sealed, of another format, version or step, naming a file that is not
            a plain name in the same folder, or a tensor whose runs do not hold each element once.
    """
    try:
        body = json.loads(data, object_pairs_hook=once)
        seal = body.pop("seal")
        wanted = _seal(body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is not a manifest", repr(error)) from error
    if seal != wanted:
        raise CheckpointError(
            f"{MANIFEST} is damaged", f"seal: want {wanted[:16]}.., got {str(seal)[:16]}.."
        )
    version = body.get("version")
    if body.get("format") != FORMAT or type(version) is not int or version not in VERSIONS:
        raise CheckpointError(
            f"{MANIFEST} is of another format",
            f"{body.get('format')!r} version {version!r}, want {FORMAT!r} "
            f"version {' or '.join(map(str, VERSIONS))}",
        )
    if body.get("step") != step:
        raise CheckpointError(f"{MANIFEST} is of another step", f"{body.get('step')}, want {step}")
    files = _entries(body.get("files"))
    tensors = None if version == 1 else _tensors(body.get("tensors"), files)
    return Manifest(step, files, tensors)


def check_cover(name: str, spec: Spec, runs: tuple[Run, ...]) -> None:
    """Raise CheckpointError unless the runs, in order, hold each element of the tensor once."""
    at = 0
    for run in runs:
        if run.start != at or run.length < 1:
            how = "no file holds" if run.start > at else "more than one run holds"
            raise CheckpointError(
                f"{name} is not whole: {how} its element {min(at, run.start)}",
                f"runs of {run.file} and before: element {at} is next, "
                f"[{run.start}, {run.stop}) comes",
            )
        at = run.stop
    if at != spec.count:
        raise CheckpointError(
            f"{name} is not whole: its runs end at element {at} of {spec.count}",
            f"shape {list(spec.shape)}, {len(runs)} runs",
        )


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


def entry_of(data: bytes) -> FileEntry:
    """What a manifest promises of a file that holds `data`."""
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


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


def _tensors(values: Any, files: dict[str, FileEntry]) -> dict[str, Tensor]:
    if not isinstance(values, dict):
        raise CheckpointError(f"{MANIFEST} lists no tensors")
    found = {}
    for name, value in values.items():
        try:
            shape, dtype = value["shape"], DTYPES[value["dtype"]]
            runs = tuple(Run(*run) for run in value["runs"])
            numbers = [*shape, *(n for run in runs for n in run[:2])]
            alien = [run.file for run in runs if run.file not in files]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{MANIFEST} lists {name} without shape, dtype and runs", repr(error)
            ) from error
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise CheckpointError(f"{MANIFEST} lists {name} of shape {shape}, runs out of range")
        if alien:
            raise CheckpointError(f"{MANIFEST} lists {name} in {alien[0]!r}, a file it lacks")
        found[name] = Tensor(Spec(tuple(shape), dtype), runs)
        check_cover(name, found[name].spec, runs)
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _seal(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
