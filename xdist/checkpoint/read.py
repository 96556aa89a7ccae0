"""Reading checkpoints: the newest one that is whole. Nothing of it is trusted before it is hashed,
and nothing is ever unpickled."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from xdist.checkpoint.folders import steps_in
from xdist.checkpoint.manifest import (
    DTYPES,
    MANIFEST,
    MAX_JSON_BYTES,
    STATE,
    parse,
    read_entry,
    read_file,
)
from xdist.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read whole.

    Attributes:
        step: optimizer steps done.
        tensors: on the CPU, by the names they were saved under.
        state: the JSON that was saved.
        path: its folder.
        rejected: newer checkpoints that were passed over, a line each.
        lost_steps: steps between the newest rejected one and this.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: Path
    rejected: tuple[str, ...] = ()
    lost_steps: int = 0

    def lines(self) -> list[str]:
        """What to tell the user about the choice: each rejected checkpoint, and the loss."""
        if not self.rejected:
            return [f"resuming from {self.path.name}"]
        return [
            *self.rejected,
            f"using {self.path.name}: {self.lost_steps} steps are lost and will be repeated",
        ]


def load(path: str | Path, *, max_bytes: int | None = None) -> Loaded:
    """Read one checkpoint folder.

    Only files that the manifest lists are opened: plain names, regular files, no links, size and
    sha256 as promised, safetensors headers with allowed dtypes whose shapes fill the file exactly.

    Args:
        path: `.../step-NNNNNNNN`.
        max_bytes: refuse more than this in all, before reading it (what the model can need).

    Raises:
        CheckpointError: naming the file, and for a hash "want .., got ..".
    """
    path = Path(path)
    step = int(path.name.rpartition("-")[2])
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    manifest = parse(read_file(path, MANIFEST, MAX_JSON_BYTES), step)
    if max_bytes is not None and manifest.total_bytes > max_bytes:
        raise CheckpointError(
            f"{path.name} is larger than this model can need",
            f"{manifest.total_bytes} bytes, at most {max_bytes} expected",
        )
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}
    for name, entry in manifest.files.items():
        if name.endswith(".json") and entry.bytes > MAX_JSON_BYTES:
            raise CheckpointError(f"{name} is too large", f"{entry.bytes} bytes")
        data = read_entry(path, name, entry)
        if name == STATE:
            state = _state(data)
        elif name.endswith(".safetensors"):
            found = _tensors(name, data)
            twice = sorted(tensors.keys() & found.keys())
            if twice:
                raise CheckpointError(f"{name} holds {twice[0]} a second time")
            tensors |= found
    return Loaded(step, tensors, state, path)


def load_latest(
    directory: str | Path,
    *,
    resume: Literal["auto", "strict", "never"] = "auto",
    max_bytes: int | None = None,
) -> Loaded | None:
    """The newest checkpoint in `directory` that is whole, by step number; None for a fresh start.

    Reads only, so that all ranks may call it. Rejected ones are listed in the result: log them.

    Args:
        directory: the run's `checkpoints/`; absent or empty means a fresh start.
        resume: "auto" passes over broken checkpoints, "strict" raises at the first, "never" starts
            afresh and refuses a directory that holds checkpoints (they would be mixed up).
        max_bytes: as in `load`.

    Raises:
        CheckpointError: none is whole though some are there, or `resume` forbids going on.
    """
    directory = Path(directory)
    candidates = steps_in(directory)
    if resume == "never" and candidates:
        raise CheckpointError(
            f'{directory} holds checkpoints, and resume is "never"',
            f"{len(candidates)} of them, the newest at step {next(iter(candidates))}",
            "give the run another name, or move them away",
        )
    rejected: list[str] = []
    for step, path in candidates.items():
        try:
            found = load(path, max_bytes=max_bytes)
        except CheckpointError as error:
            reason = f"{error.what} ({error.why})" if error.why else error.what
            rejected.append(f"{path.name} rejected: {reason}")
            if resume == "strict":
                raise CheckpointError(
                    rejected[0],
                    'checkpoint.resume is "strict", so no older one is used',
                    f"look at {path}, or set checkpoint.resume=auto",
                ) from error
            continue
        lost = next(iter(candidates)) - step
        return Loaded(step, found.tensors, found.state, path, tuple(rejected), lost)
    if rejected:
        raise CheckpointError(
            f"{directory} holds checkpoints, and none of them is whole",
            "; ".join(rejected),
            "restore one of them, or give the run another name to start from scratch",
        )
    return None


def _state(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{STATE} is not JSON", str(error)) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} does not hold an object")
    return state


def _tensors(name: str, data: bytes) -> dict[str, torch.Tensor]:
    _check_header(name, data)
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{name} is not a safetensors file", str(error)) from error


def _check_header(name: str, data: bytes) -> None:
    """Hold the header against the file before any tensor is made of it."""
    size = int.from_bytes(data[:8], "little")
    if size > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{name} announces a header of {size} bytes")
    try:
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        spans = []
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(f"{name} holds {key} of dtype {entry['dtype']!r}")
            if any(type(n) is not int or n < 0 for n in (begin, end, *entry["shape"])):
                raise CheckpointError(f"{name} holds {key} of shape {entry['shape']}")
            if math.prod(entry["shape"]) * dtype.itemsize != end - begin:
                raise CheckpointError(f"{name} holds {key}, whose shape does not fill its bytes")
            spans.append((begin, end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name} has no safetensors header", repr(error)) from error
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{name} has a gap or an overlap at byte {at}")
        at = end
    if 8 + size + at != len(data):
        raise CheckpointError(
            f"{name} holds {len(data)} bytes, its header describes {8 + size + at}"
        )
