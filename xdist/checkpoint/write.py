"""Writing a checkpoint: beside, flushed, checksummed, renamed; a crash at any instant leaves the
last good one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from xdist.checkpoint.folders import flush_folder, folder_name, steps_in
from xdist.checkpoint.manifest import DTYPES, MANIFEST, STATE, FileEntry, render
from xdist.checkpoint.points import OnPoint, ignore
from xdist.errors import CheckpointError, NumericsError

MAX_FILE_BYTES = 1 << 30
_GROUP = "tensors"
_HASH_BLOCK_BYTES = 1 << 22
# Headers, JSON and the file system's own blocks, beside the tensors.
_SLACK_BYTES = 1 << 20


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
    """Write the checkpoint of `step` and delete older ones beyond the newest `keep`.

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
    if keep < 1 or step < 0:
        raise CheckpointError("a checkpoint needs keep >= 1 and step >= 0", f"{keep} and {step}")
    _check_dtypes(tensors)
    require_finite(tensors)
    directory = Path(directory)
    state_bytes = _json(state)
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) + len(state_bytes)
    on_point("save.begin")
    beside: Path | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        free = shutil.disk_usage(directory).free
        if free < needed + _SLACK_BYTES:
            raise _no_room(directory, needed, free, "the disk is too full")
        beside = Path(tempfile.mkdtemp(prefix=f".tmp-{folder_name(step)}-", dir=directory))
        _fill(beside, step, _in_files(tensors, max_file_bytes), state_bytes, on_point)
        path = _publish(beside, directory / folder_name(step), on_point)
    except (OSError, SafetensorError) as error:
        raise _no_room(directory, needed, _free(directory), str(error)) from error
    finally:
        # Also when interrupted; a kill leaves it to `clean_stale`.
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    try:
        _prune(directory, step, keep, on_point)
    except OSError as error:
        raise CheckpointError(
            f"{path.name} was saved, but older checkpoints could not be deleted", str(error)
        ) from error
    on_point("save.end")
    return path


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same question for every rank: agree on `ok` and `fatal`.

    `fatal` when the run must stop: values that are not finite, or the second failure in a row.
    `text` is the line to log when it failed, `error` what was raised.
    """

    ok: bool
    fatal: bool = False
    path: Path | None = None
    text: str = ""
    error: CheckpointError | NumericsError | None = None


class Saver:
    """Saves of one run: one failed save is a warning, two in a row end the run."""

    def __init__(self, directory: str | Path, *, keep: int = 2, on_point: OnPoint = ignore) -> None:
        self.directory = Path(directory)
        self.keep = keep
        self.on_point = on_point
        self.failures = 0

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> Outcome:
        """As `save`, but a failure is returned: all ranks have to hear of it before one raises."""
        try:
            path = save(
                self.directory, step, tensors, state, keep=self.keep, on_point=self.on_point
            )
        except (CheckpointError, NumericsError) as error:
            self.failures += 1
            fatal = isinstance(error, NumericsError) or self.failures > 1
            return Outcome(False, fatal, None, f"step {step} was not saved: {error}", error)
        self.failures = 0
        return Outcome(True, path=path)


def require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise NumericsError naming the first tensor that holds NaN or infinity, and how many."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or torch.isfinite(tensor).all():
            continue
        count = int((~torch.isfinite(tensor)).sum())
        raise NumericsError(
            f"the checkpoint would hold values that are not finite: {name}",
            f"{count} of {tensor.numel()} elements are NaN or infinite",
            "the last checkpoint stays as it is; lower the learning rate or look for the step "
            "that made them",
        )


def _fill(
    folder: Path,
    step: int,
    files: dict[str, dict[str, torch.Tensor]],
    state_bytes: bytes,
    on_point: OnPoint,
) -> None:
    """Write and flush everything of a checkpoint into `folder`, the manifest last."""
    folder.chmod(0o750)
    on_point("save.folder_made")
    entries: dict[str, FileEntry] = {}
    for name, group in files.items():
        save_file({key: _whole(tensor) for key, tensor in group.items()}, folder / name)
        on_point("save.tensors_written")
        entries[name] = _seal_file(folder / name)
    on_point("save.tensors_flushed")
    (folder / STATE).write_bytes(state_bytes)
    on_point("save.state_written")
    entries[STATE] = _seal_file(folder / STATE)
    on_point("save.before_manifest")
    data = render(step, entries)
    with (folder / MANIFEST).open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        on_point("save.manifest_half_written")
        file.write(data[len(data) // 2 :])
    on_point("save.manifest_written")
    _seal_file(folder / MANIFEST)
    flush_folder(folder)
    on_point("save.folder_flushed")


def _publish(beside: Path, path: Path, on_point: OnPoint) -> Path:
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


def _in_files(
    tensors: Mapping[str, torch.Tensor], max_file_bytes: int
) -> dict[str, dict[str, torch.Tensor]]:
    """File name -> tensors, in sorted order, so that equal content gives equal files."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    filled: dict[str, tuple[int, int]] = {}
    for name in sorted(tensors):
        group = name.split("/", 1)[0] if "/" in name else _GROUP
        if not group.replace("_", "").isalnum() or not group.isascii():
            raise CheckpointError(f"tensor {name!r} cannot name a file", f"the group is {group!r}")
        size = tensors[name].numel() * tensors[name].element_size()
        number, held = filled.get(group, (1, 0))
        if held and held + size > max_file_bytes:
            number, held = number + 1, 0
        filled[group] = (number, held + size)
        files.setdefault(f"{group}-{number:05}.safetensors", {})[name] = tensors[name]
    return files


def _check_dtypes(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse to write what `load` would refuse to read."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"tensor {name} cannot be saved",
                f"dtype {tensor.dtype}, allowed: {', '.join(DTYPES)}",
            )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous, in a storage of exactly its own elements."""
    moved = tensor.detach().to("cpu").contiguous()
    # A view would write its whole storage, and two names of one storage are refused.
    return moved.clone()


def _seal_file(path: Path) -> FileEntry:
    """Flush a file to the disk; its size and sha256 as they are read back."""
    path.chmod(0o640)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
        return FileEntry(file.tell(), digest.hexdigest())


def _json(state: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(state), allow_nan=False, sort_keys=True, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError("the state of a checkpoint must be JSON", str(error)) from error


def _free(directory: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(directory).free
    return 0


def _no_room(directory: Path, needed: int, free: int, reason: str) -> CheckpointError:
    return CheckpointError(
        f"no checkpoint could be written to {directory}",
        f"{reason}; needed {needed} bytes, free {free}",
        "earlier checkpoints are untouched; free some space, lower checkpoint.keep or name "
        "another run.directory",
    )
