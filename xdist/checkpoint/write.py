"""Writing a checkpoint: beside, flushed, checksummed, renamed; a crash at any instant leaves the
last good one.

Three parts, so that many ranks can write one checkpoint: `start_folder` on one rank, `write_part`
on every rank, `publish` on the first rank with what all parts returned. `save` makes the three of
them for whole tensors on one rank.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xdist.checkpoint import manifest as manifests
from xdist.checkpoint.folders import flush_folder, folder_name, steps_in
from xdist.checkpoint.manifest import (
    DTYPES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    STATE,
    FileEntry,
    Run,
    check_cover,
    render,
)
from xdist.checkpoint.pieces import Piece, Spec
from xdist.checkpoint.points import OnPoint, ignore
from xdist.checkpoint.tensor_file import write_tensors
from xdist.errors import CheckpointError, NumericsError

MAX_FILE_BYTES = 1 << 30
_GROUP = "tensors"
# Headers, JSON and the file system's own blocks, beside the tensors.
_SLACK_BYTES = 1 << 20


class Part(NamedTuple):
    """What one rank wrote: its files, and its runs by tensor. JSON as it is."""

    files: dict[str, list[Any]]  # name: [bytes, sha256]
    runs: dict[str, list[Any]]  # tensor: [start, length, file]


def save(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    on_point: OnPoint = ignore,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write whole tensors as the checkpoint of `step`; delete older ones beyond the newest `keep`.

    Call on one rank. Everything goes into a folder beside, each file and the folder are flushed to
    the disk, the manifest comes last, then the folder is renamed to `step-NNNNNNNN`. An existing
    folder of the same step is replaced, and put back by `clean_stale` if that is cut short.

    Args:
        directory: the run's `checkpoints/`, made when absent.
        tensors: by name. The part before the first "/" names the file: `model/...`,
            `optimizer/...`. Any device, strides and sharing; bits are kept.
        state: JSON (no NaN).
        keep: how many checkpoints stay, this one included, at least 1. Newer ones stay.
        on_point: called at each of `points.SAVE_POINTS`.
        max_file_bytes: a group of tensors is cut into files of about this size.

    Raises:
        NumericsError: a tensor holds NaN or infinity; nothing was written.
        CheckpointError: the disk is full or cannot be written, with bytes needed and free, or the
            state is not JSON; the earlier checkpoints are as they were.
    """
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    pieces = {name: Piece(tuple(t.shape), 0, t.reshape(-1)) for name, t in tensors.items()}
    require_finite(pieces)
    folder = start_folder(directory, step, specs, state, keep=keep, on_point=on_point)
    try:
        part = write_part(folder, 0, pieces, on_point=on_point, max_file_bytes=max_file_bytes)
        return publish(folder, step, specs, [part], state, keep=keep, on_point=on_point)
    finally:
        # Also when interrupted; a kill leaves it to `clean_stale`.
        abandon(folder)


def start_folder(
    directory: str | Path,
    step: int,
    specs: Mapping[str, Spec],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    on_point: OnPoint = ignore,
) -> Path:
    """The new folder beside into which every rank writes its part. On the first rank.

    Raises:
        CheckpointError: no room for the whole tensors, or the state is not JSON.
    """
    if keep < 1 or step < 0:
        raise CheckpointError("a checkpoint needs keep >= 1 and step >= 0", f"{keep} and {step}")
    _check_specs(specs)
    needed = _needed(specs) + len(_json(state))
    on_point("save.begin")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(directory).free
        if free < needed + _SLACK_BYTES:
            raise _no_room(directory, needed, "the disk is too full", free)
        # mkdtemp gives it the mode 0700.
        folder = Path(tempfile.mkdtemp(prefix=f".tmp-{folder_name(step)}-", dir=directory))
    except OSError as error:
        raise _no_room(directory, needed, str(error)) from error
    on_point("save.folder_made")
    return folder


def write_part(
    folder: Path,
    rank: int,
    pieces: Mapping[str, Piece],
    *,
    on_point: OnPoint = ignore,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Part:
    """Write and flush what one rank holds: `rank-00002-model-00001.safetensors` and so on.

    The tensors in a file are 1-D, named NAME@START. Nothing is exchanged: ranks do this at once.

    Raises:
        NumericsError: a piece holds NaN or infinity; nothing was written.
        CheckpointError: a file cannot be written.
    """
    require_finite(pieces)
    held = {name: piece for name, piece in pieces.items() if piece.values.numel()}
    files: dict[str, list[Any]] = {}
    runs: dict[str, list[Any]] = {}
    try:
        for file, names in _in_files(held, rank, max_file_bytes).items():
            entry = write_tensors(
                folder / file, {f"{name}@{held[name].start}": held[name].values for name in names}
            )
            on_point("save.tensors_written")
            _flush(folder / file)
            files[file] = list(entry)
            for name in names:
                runs[name] = [held[name].start, held[name].values.numel(), file]
    except OSError as error:
        needed = sum(piece.values.nbytes for piece in held.values())
        raise _no_room(folder.parent, needed, str(error)) from error
    on_point("save.tensors_flushed")
    return Part(files, runs)


def publish(
    folder: Path,
    step: int,
    specs: Mapping[str, Spec],
    parts: Iterable[Part],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    on_point: OnPoint = ignore,
) -> Path:
    """Make the folder a checkpoint: state, manifest, rename; then delete old ones. On one rank.

    Raises:
        CheckpointError: an element of a tensor is in no part or in two, a file is not there as its
            rank wrote it, or something cannot be written.
    """
    parts = list(parts)
    tensors = _tensors(specs, parts)
    entries = {file: FileEntry(*values) for part in parts for file, values in part.files.items()}
    try:
        for file, entry in entries.items():
            _check_visible(folder, file, entry)
        entries[STATE] = _write_json(folder / STATE, _json(state), on_point, "save.state_written")
        on_point("save.before_manifest")
        _write_manifest(folder, render(step, entries, tensors), on_point)
        flush_folder(folder)
        on_point("save.folder_flushed")
        path = _rename(folder, folder.parent / folder_name(step), on_point)
    except OSError as error:
        raise _no_room(folder.parent, _needed(specs), str(error)) from error
    try:
        _prune(path.parent, step, keep, on_point)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} was saved, but older checkpoints could not be deleted", str(error)
        ) from error
    on_point("save.end")
    return path


def abandon(folder: Path) -> None:
    """Remove a folder that did not become a checkpoint; no error when it did."""
    shutil.rmtree(folder, ignore_errors=True)


def require_finite(pieces: Mapping[str, Piece]) -> None:
    """Raise NumericsError naming the first tensor that holds NaN or infinity, and how many."""
    for name, piece in pieces.items():
        values = piece.values
        if not values.is_floating_point() or torch.isfinite(values).all():
            continue
        count = int((~torch.isfinite(values)).sum())
        raise NumericsError(
            f"the checkpoint would hold values that are not finite: {name}",
            f"{count} of {values.numel()} elements are NaN or infinite",
            "the last checkpoint stays as it is; lower the learning rate or look for the step "
            "that made them",
        )


def _tensors(specs: Mapping[str, Spec], parts: list[Part]) -> dict[str, manifests.Tensor]:
    """Runs by tensor, each element of each exactly once."""
    runs: dict[str, list[Run]] = {name: [] for name in specs}
    for part in parts:
        for name, run in part.runs.items():
            if name not in runs:
                raise CheckpointError(f"{name} is in no specification of this checkpoint")
            runs[name].append(Run(*run))
    found = {}
    for name, spec in specs.items():
        ordered = tuple(sorted(runs[name]))
        check_cover(name, spec, ordered)
        found[name] = manifests.Tensor(spec, ordered)
    return found


def _check_visible(folder: Path, file: str, entry: FileEntry) -> None:
    """A file that another rank wrote must be seen here, whole."""
    path = folder / file
    size = path.stat().st_size if path.exists() else None
    if size != entry.bytes:
        raise CheckpointError(
            f"{file} was written by its rank, and is not whole on the first rank",
            f"want {entry.bytes} bytes in {folder}, got {'no file' if size is None else size}",
            "run.directory must be on a file system that all hosts share",
        )


def _write_manifest(folder: Path, data: bytes, on_point: OnPoint) -> None:
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{MANIFEST} would be too large to be read",
            f"{len(data)} bytes, at most {MAX_MANIFEST_BYTES}",
        )
    with _new_file(folder / MANIFEST) as file:
        file.write(data[: len(data) // 2])
        file.flush()
        on_point("save.manifest_half_written")
        file.write(data[len(data) // 2 :])
    on_point("save.manifest_written")
    _flush(folder / MANIFEST)


def _rename(beside: Path, path: Path, on_point: OnPoint) -> Path:
    """Give the finished folder its name; one of the same name makes room and goes afterwards."""
    old: Path | None = None
    if path.exists():
        old = path.with_name(beside.name.replace(".tmp-", ".old-", 1))
        os.replace(path, old)
        on_point("save.old_moved")
    try:
        os.replace(beside, path)
    except OSError:
        if old is not None:
            os.replace(old, path)
        raise
    on_point("save.renamed")
    flush_folder(path.parent)
    on_point("save.directory_flushed")
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _prune(directory: Path, step: int, keep: int, on_point: OnPoint) -> None:
    """Delete checkpoints older than `step` beyond the newest `keep - 1` of them.

    Each is renamed first, so that no half-deleted folder ever bears a checkpoint's name.
    """
    older = [path for at, path in steps_in(directory).items() if at < step]
    for path in older[keep - 1 :]:
        gone = Path(tempfile.mkdtemp(prefix=f".gone-{path.name}-", dir=directory))
        os.replace(path, gone)
        on_point("save.prune_moved")
        shutil.rmtree(gone, ignore_errors=True)
        on_point("save.pruned")


def _in_files(pieces: Mapping[str, Piece], rank: int, max_file_bytes: int) -> dict[str, list[str]]:
    """File name -> names, in sorted order, so that equal content gives equal files."""
    files: dict[str, list[str]] = {}
    filled: dict[str, tuple[int, int]] = {}
    for name in sorted(pieces):
        group = name.split("/", 1)[0] if "/" in name else _GROUP
        if not group.replace("_", "").isalnum() or not group.isascii():
            raise CheckpointError(f"tensor {name!r} cannot name a file", f"the group is {group!r}")
        size = pieces[name].values.nbytes
        number, held = filled.get(group, (1, 0))
        if held and held + size > max_file_bytes:
            number, held = number + 1, 0
        filled[group] = (number, held + size)
        files.setdefault(f"rank-{rank:05}-{group}-{number:05}.safetensors", []).append(name)
    return files


def _check_specs(specs: Mapping[str, Spec]) -> None:
    """Refuse to write what `load` would refuse to read."""
    for name, spec in specs.items():
        if spec.dtype not in DTYPES.values():
            raise CheckpointError(
                f"tensor {name} cannot be saved",
                f"dtype {spec.dtype}, allowed: {', '.join(DTYPES)}",
            )


def _needed(specs: Mapping[str, Spec]) -> int:
    return sum(spec.count * spec.dtype.itemsize for spec in specs.values())


def _new_file(path: Path) -> Any:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def _write_json(path: Path, data: bytes, on_point: OnPoint, point: str) -> FileEntry:
    with _new_file(path) as file:
        file.write(data)
    on_point(point)
    _flush(path)
    return manifests.entry_of(data)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(state: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(state), allow_nan=False, sort_keys=True, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError("the state of a checkpoint must be JSON", str(error)) from error


def _no_room(directory: Path, needed: int, reason: str, free: int | None = None) -> CheckpointError:
    if free is None:
        try:
            free = shutil.disk_usage(directory).free
        except OSError:
            free = 0
    return CheckpointError(
        f"no checkpoint could be written to {directory}",
        f"{reason}; needed {needed} bytes, free {free}",
        "earlier checkpoints are untouched; free some space, lower checkpoint.keep or name "
        "another run.directory",
    )
