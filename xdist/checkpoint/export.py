"""Parameters as HuggingFace lays them out: safetensors files of whole tensors, index, config.

    model-00001-of-00003.safetensors ...   whole tensors under the model's own names
    model.safetensors.index.json           {"metadata": {"total_size": ..}, "weight_map": {..}}
    config.json                            the model section of the run's config

One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from xdist.checkpoint.folders import flush_folder, steps_in
from xdist.checkpoint.pieces import Spec
from xdist.checkpoint.read import Checkpoint, open_checkpoint, open_latest
from xdist.checkpoint.tensor_file import write_file
from xdist.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_PREFIX = "model/"


def checkpoints_of(where: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, or the one folder given.

    Raises:
        CheckpointError: there are none.
    """
    if where in steps_in(where.parent).values():
        return [where]
    for directory in (where / "checkpoints", where):
        found = list(steps_in(directory).values())
        if found:
            return found
    raise CheckpointError(
        f"no checkpoint at {where}",
        "neither a folder step-NNNNNNNN nor a run with some in checkpoints/",
        "name a run, e.g. runs/NAME, or one checkpoint in it",
    )


def export_checkpoint(where: Path, out: Path, *, max_file_bytes: int = 5 << 30) -> list[str]:
    """Write the parameters of a checkpoint (of a run: the newest whole one); lines that say so.

    Raises:
        CheckpointError: no whole checkpoint, `out` exists, or it cannot be written.
    """
    found = _chosen(where)
    if out.exists():
        raise CheckpointError(f"{out} exists", "an export makes its own folder", "name another")
    names = {
        name.removeprefix(_PREFIX): spec
        for name, spec in found.specs.items()
        if name.startswith(_PREFIX)
    }
    if not names:
        raise CheckpointError(f"{found.path} holds no parameters")
    files = _in_files(names, max_file_bytes)
    beside: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        for file, held in files.items():
            specs = {name: names[name] for name in held}
            write_file(beside / file, specs, lambda n: found.read(_PREFIX + n), {"format": "pt"})
        total = sum(_bytes(spec) for spec in names.values())
        where_is = {name: file for file, held in files.items() for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": where_is}
        _write(beside / INDEX, index)
        _write(beside / "config.json", found.state.get("config", {}).get("model", {}))
        flush_folder(beside)
        os.replace(beside, out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written", str(error)) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    return [
        *found.rejected,
        f"{out}: {len(names)} tensors of {found.path.name}, {total:,} bytes in {len(files)} files",
    ]


def _chosen(where: Path) -> Checkpoint:
    paths = checkpoints_of(where)
    if paths == [where]:
        return open_checkpoint(where)
    found = open_latest(paths[0].parent)
    assert found is not None
    return found


def _in_files(specs: Mapping[str, Spec], max_file_bytes: int) -> dict[str, list[str]]:
    """Names by file; a tensor larger than a file has one to itself."""
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(specs):
        size = _bytes(specs[name])
        if groups[-1] and held + size > max_file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    total = len(groups)
    return {f"model-{i + 1:05}-of-{total:05}.safetensors": g for i, g in enumerate(groups)}


def _bytes(spec: Spec) -> int:
    return spec.count * spec.dtype.itemsize


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
