"""`xdist prepare task`: samples of a synthetic task -> a token store with the scored answers."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from xdist.data.identity import TASK_FORMAT, VERSION, fingerprint
from xdist.data.prepare import Prepared, Progress, describe, make_array, put_in_place
from xdist.data.store import TextStore
from xdist.data.tasks import Task, facts_of, task_of
from xdist.errors import ConfigError, DataError

STREAMS = {"train": 0, "held_out": 1}
CHUNK_BYTES = 1 << 18
# Tokens that are made at once, in whole samples.
_BLOCK_TOKENS = 1 << 20


def prepare_task(
    name: str,
    store: str | Path,
    *,
    length: int,
    samples: int,
    held_out: int = 256,
    held_out_length: int | None = None,
    seed: int = 0,
    existing: Literal["error", "keep", "replace"] = "error",
    on_progress: Progress | None = None,
    **options: Any,
) -> Prepared:
    """Write `samples` samples of the task `name` as split `train`, and `held_out` others.

    Args:
        name: mqar, passkey, copy or state_tracking (`xdist.data.tasks`).
        store: the folder to make.
        length, held_out_length: tokens of one sample of each split; None is the same for both.
        seed: the samples are a pure function of it, of the split and of their number: more of
            them begin with the same ones.
        existing: what to do with a store that is there: refuse, keep it when it was made with the
            same settings (else refuse), or replace it.
        options: of the task; None stands for its default.

    Raises:
        ConfigError: an unknown task or option, or sizes that do not fit it.
        DataError: a store in the way.
    """
    task = task_of(name, options)
    lengths = {"train": length, "held_out": held_out_length or length}
    counts = {"train": samples, "held_out": held_out}
    if samples < 1 or held_out < 0 or not 0 <= seed < 1 << 63:
        raise ConfigError(
            "a task needs a sample, and a seed of 63 bits",
            f"samples = {samples}, held_out = {held_out}, seed = {seed}",
        )
    splits = [split for split in STREAMS if counts[split]]
    for split in splits:
        task.check(lengths[split])
    target = Path(store)
    wanted = {
        "task": facts_of(task) | {"seed": seed},
        "samples": {split: [counts[split], lengths[split]] for split in splits},
    }
    if target.exists() or target.is_symlink():
        if existing == "error":
            raise DataError(
                f"{target} exists", "nothing was written", "replace it, or name another folder"
            )
        if existing == "keep":
            return _kept(target, wanted)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        beside.chmod(0o750)
        _write(beside, task, seed, wanted, on_progress)
        put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return describe(target, kept=False)


def _write(
    folder: Path, task: Task, seed: int, wanted: dict[str, Any], tell: Progress | None
) -> None:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    splits = {}
    for split, (count, length) in wanted["samples"].items():
        splits[split] = _write_split(group, split, task, seed, count, length, tell)
    facts = {
        "format": TASK_FORMAT,
        "version": VERSION,
        "vocabulary_size": task.vocabulary_size,
        "dtype": _token_dtype(task).name,
        "task": wanted["task"],
        "splits": splits,
    }
    group.attrs["xdist"] = {
        "format": TASK_FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(facts),
        "facts": facts,
        "figures": {},
    }


def _write_split(
    group: zarr.Group,
    split: str,
    task: Task,
    seed: int,
    count: int,
    length: int,
    tell: Progress | None,
) -> dict[str, Any]:
    """Write one split; returns its facts (counts and hashes)."""
    total = count * length
    dtypes = {
        "tokens": _token_dtype(task),
        # One more than the answer, so that 0 says "not scored".
        "labels": np.dtype(np.min_scalar_type(task.vocabulary_size)),
    }
    chunks = {part: max(1, CHUNK_BYTES // dtype.itemsize) for part, dtype in dtypes.items()}
    arrays = {
        part: _Growing(make_array(group, f"{split}/{part}", total, dtype, chunks[part]))
        for part, dtype in dtypes.items()
    }
    scored = 0
    for tokens, labels in _blocks(task, seed, STREAMS[split], count, length):
        arrays["tokens"].add(tokens)
        arrays["labels"].add(labels + 1)
        scored += int((labels >= 0).sum())
        if tell is not None:
            tell(arrays["tokens"].added, total)
    hashes = {f"{part}_sha256": array.close() for part, array in arrays.items()}
    table = np.arange(count + 1, dtype=np.int64) * length
    make_array(group, f"{split}/documents", table.size, table.dtype, 1 << 15)[:] = table
    raw = b"".join(b"%d\0" % number for number in range(count))
    make_array(group, f"{split}/names", len(raw), np.dtype(np.uint8), 1 << 18)[:] = np.frombuffer(
        raw, dtype=np.uint8
    )
    return {
        "tokens": total,
        "documents": count,
        "sample_length": length,
        "scored": scored,
        **hashes,
        "documents_sha256": hashlib.sha256(table.tobytes()).hexdigest(),
        "names_sha256": hashlib.sha256(raw).hexdigest(),
    }


def _blocks(
    task: Task, seed: int, stream: int, count: int, length: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Tokens and labels of all samples in order, flat, a block of samples at a time."""
    step = max(1, _BLOCK_TOKENS // length)
    for start in range(0, count, step):
        numbers = np.arange(start, min(start + step, count))
        tokens, labels = task.make(length, seed, stream, numbers)
        yield tokens.reshape(-1), labels.reshape(-1)


class _Growing:
    """Fills an array from its beginning in whole chunks, each of which is compressed once."""

    def __init__(self, array: zarr.Array) -> None:
        self.array = array
        self.added = 0
        self._written = 0
        self._held: list[NDArray[Any]] = []
        self._digest = hashlib.sha256()

    def add(self, values: NDArray[np.int64]) -> None:
        narrow = values.astype(self.array.dtype)
        self._digest.update(narrow.tobytes())
        self._held.append(narrow)
        self.added += narrow.size
        chunk = int(self.array.chunks[0])
        whole = (self.added - self._written) // chunk * chunk
        if whole:
            joined = np.concatenate(self._held)
            self.array[self._written : self._written + whole] = joined[:whole]
            self._held, self._written = [joined[whole:]], self._written + whole

    def close(self) -> str:
        """Write what is left; the sha256 of all, hex."""
        if self.added > self._written:
            self.array[self._written :] = np.concatenate(self._held)
        return self._digest.hexdigest()


def _token_dtype(task: Task) -> np.dtype[Any]:
    return np.dtype(np.min_scalar_type(task.vocabulary_size - 1))


def _kept(target: Path, wanted: dict[str, Any]) -> Prepared:
    facts = TextStore(target).identity["facts"]
    found = {
        "task": facts.get("task"),
        "samples": {
            split: [one["documents"], one.get("sample_length")]
            for split, one in facts["splits"].items()
        },
    }
    if found != wanted:
        raise DataError(
            f"{target} holds other data than these settings",
            f"it has {found}, asked for are {wanted}",
            "replace it, or name another folder",
        )
    return describe(target, kept=True)
