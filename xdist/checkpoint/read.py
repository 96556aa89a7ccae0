"""Reading checkpoints: the newest one that is whole. Nothing of it is trusted before it is hashed,
nothing is ever unpickled, and tensors are read one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from xdist.checkpoint import manifest as manifests
from xdist.checkpoint.folders import steps_in
from xdist.checkpoint.manifest import (
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_MANIFEST_BYTES,
    STATE,
    Manifest,
    Run,
    parse,
    read_entry,
    read_file,
)
from xdist.checkpoint.pieces import Spec
from xdist.checkpoint.tensor_file import TensorFile, check_file
from xdist.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole: every file hashed, every element there once.

    Attributes:
        step: optimizer steps done.
        state: the JSON that was saved.
        path: its folder.
        total_bytes: of all files it lists.
        rejected: newer checkpoints that were passed over, a line each.
        lost_steps: steps between the newest rejected one and this.
    """

    step: int
    state: dict[str, Any]
    path: Path
    total_bytes: int
    rejected: tuple[str, ...] = ()
    lost_steps: int = 0
    _tensors: dict[str, manifests.Tensor] = field(default_factory=dict, repr=False)
    _keys: dict[str, str] = field(default_factory=dict, repr=False)
    _files: dict[str, TensorFile] = field(default_factory=dict, repr=False)

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor, by name."""
        return {name: tensor.spec for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU, in memory of its own; nothing else is held.

        Raises:
            CheckpointError: a file is no longer the one that was hashed.
        """
        spec, runs = self._tensors[name]
        flat = torch.empty(spec.count, dtype=spec.dtype)
        for run in runs:
            file = self._files[run.file]
            entry = file.entries[self._keys.get(name, f"{name}@{run.start}")]
            file.read_into(entry, flat[run.start : run.stop])
        return flat.view(spec.shape)

    def lines(self) -> list[str]:
        """What to tell the user about the choice: each rejected checkpoint, and the loss."""
        if not self.rejected:
            return [f"resuming from {self.path.name}"]
        return [
            *self.rejected,
            f"using {self.path.name}: {self.lost_steps} steps are lost and will be repeated",
        ]


@dataclass(frozen=True)
class Loaded(Checkpoint):
    """A checkpoint with all of its tensors, on the CPU, by the names they were saved under."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


def open_checkpoint(path: str | Path, *, max_bytes: int | None = None) -> Checkpoint:
    """Check one checkpoint folder whole, without making a tensor of it.

    Only files that the manifest lists are opened: plain names, regular files, no links, size and
    sha256 as promised, safetensors headers with allowed dtypes whose shapes fill the file exactly,
    and the runs of every tensor in the files that the manifest names, each element once.

    Args:
        path: `.../step-NNNNNNNN`.
        max_bytes: refuse more than this in all, before reading it (what the model can need).

    Raises:
        CheckpointError: naming the file, and for a hash "want .., got ..".
    """
    path = Path(path)
    number = path.name.rpartition("-")[2]
    if path.is_symlink() or not path.is_dir() or not number.isdecimal():
        raise CheckpointError(f"{path} is not a folder of a checkpoint, step-NNNNNNNN")
    manifest = parse(read_file(path, MANIFEST, MAX_MANIFEST_BYTES), int(number))
    if max_bytes is not None and manifest.total_bytes > max_bytes:
        raise CheckpointError(
            f"{path.name} is larger than this model can need",
            f"{manifest.total_bytes} bytes, at most {max_bytes} expected",
        )
    state: dict[str, Any] = {}
    files: dict[str, TensorFile] = {}
    for name, entry in manifest.files.items():
        if name.endswith(".safetensors"):
            files[name] = check_file(path / name, entry)
            continue
        if entry.bytes > MAX_JSON_BYTES:
            raise CheckpointError(f"{name} is too large", f"{entry.bytes} bytes")
        data = read_entry(path, name, entry)
        if name == STATE:
            state = _state(data)
    if manifest.tensors is None:
        tensors, keys = _whole_tensors(files)
    else:
        tensors, keys = manifest.tensors, {}
        _check_runs(manifest, files)
    return Checkpoint(
        manifest.step,
        state,
        path,
        manifest.total_bytes,
        _tensors=tensors,
        _keys=keys,
        _files=files,
    )


def open_latest(
    directory: str | Path,
    *,
    resume: Literal["auto", "strict", "never"] = "auto",
    max_bytes: int | None = None,
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None when there are none. Order is by step alone.

    Call `clean_stale` before, on one rank; let one rank read and share what it read, so that all
    ranks start from the same one.

    Args:
        directory: the run's `checkpoints/`; absent or empty means a fresh start.
        resume: "auto" passes over broken checkpoints, "strict" raises at the first, "never" starts
            afresh and refuses a directory that holds checkpoints (they would be mixed up).
        max_bytes: as in `open_checkpoint`.

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
            found = open_checkpoint(path, max_bytes=max_bytes)
        except CheckpointError as error:
            rejected.append(f"{path.name} rejected: {reason(error)}")
            if resume == "strict":
                raise CheckpointError(
                    rejected[0],
                    'checkpoint.resume is "strict", so no older one is used',
                    f"look at {path}, or set checkpoint.resume=auto",
                ) from error
            continue
        lost = next(iter(candidates)) - step
        return with_notes(found, rejected, lost)
    if rejected:
        raise CheckpointError(
            f"{directory} holds checkpoints, and none of them is whole",
            "; ".join(rejected),
            "restore one of them, or give the run another name to start from scratch",
        )
    return None


def load(path: str | Path, *, max_bytes: int | None = None) -> Loaded:
    """`open_checkpoint`, with all tensors in memory at once."""
    return _loaded(open_checkpoint(path, max_bytes=max_bytes))


def load_latest(
    directory: str | Path,
    *,
    resume: Literal["auto", "strict", "never"] = "auto",
    max_bytes: int | None = None,
) -> Loaded | None:
    """`open_latest`, with all tensors in memory at once."""
    found = open_latest(directory, resume=resume, max_bytes=max_bytes)
    return None if found is None else _loaded(found)


def with_notes(found: Checkpoint, rejected: list[str], lost_steps: int) -> Checkpoint:
    """The same checkpoint, with lines for the user."""
    fields = {**found.__dict__, "rejected": tuple(rejected), "lost_steps": lost_steps}
    return Checkpoint(**fields)


def reason(error: CheckpointError) -> str:
    """What and why of an error, on one line."""
    return f"{error.what} ({error.why})" if error.why else error.what


def _loaded(found: Checkpoint) -> Loaded:
    tensors = {name: found.read(name) for name in found.specs}
    return Loaded(**found.__dict__, tensors=tensors)


def _check_runs(manifest: Manifest, files: dict[str, TensorFile]) -> None:
    """The files hold exactly the runs that the manifest lists (each element once is checked)."""
    assert manifest.tensors is not None
    listed = {name: set(file.entries) for name, file in files.items()}
    for name, (spec, runs) in manifest.tensors.items():
        for run in runs:
            file, key = files.get(run.file), f"{name}@{run.start}"
            entry = file.entries.get(key) if file else None
            if entry is None or (entry.dtype, entry.shape) != (spec.dtype, (run.length,)):
                raise CheckpointError(
                    f"{run.file} does not hold {key} as {MANIFEST} lists it",
                    f"want {spec.dtype} {(run.length,)}, "
                    f"got {entry and (entry.dtype, entry.shape)}",
                )
            listed[run.file].discard(key)
    for name, left in listed.items():
        if left:
            raise CheckpointError(f"{name} holds {min(left)}, which {MANIFEST} does not list")


def _whole_tensors(
    files: dict[str, TensorFile],
) -> tuple[dict[str, manifests.Tensor], dict[str, str]]:
    """Version 1: every file holds whole tensors under their own names."""
    found: dict[str, manifests.Tensor] = {}
    for name, file in files.items():
        for key, entry in file.entries.items():
            if key in found:
                raise CheckpointError(f"{name} holds tensors of other files a second time", key)
            spec = Spec(entry.shape, entry.dtype)
            runs = (Run(0, spec.count, name),) if spec.count else ()
            found[key] = manifests.Tensor(spec, runs)
    return found, {key: key for key in found}


def _state(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{STATE} is not JSON", str(error)) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} does not hold an object")
    return state
