"""Which files become documents: explicit files, folders, or the running Python's own sources."""

from __future__ import annotations

import hashlib
import stat
import sysconfig
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from xdist.errors import DataError

_PROBE_BYTES = 8192
# 64 bits of a hash, read as a number in [0, 1).
_HASH_SPAN = float(1 << 64)


class Source(NamedTuple):
    """One file: the name it has in the store, where it lies, and its size in bytes."""

    name: str
    path: Path
    size_bytes: int


class Sources(NamedTuple):
    """Files sorted by name, and those that were passed over: `path: reason`."""

    files: tuple[Source, ...]
    skipped: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def collect(paths: Iterable[str | Path], *, pattern: str = "*", text_only: bool = True) -> Sources:
    """Regular, readable, non-empty files: those named, and those in folders that fit `pattern`.

    A file in a folder is named `folder/relative/path`, so that names do not depend on where the
    folder lies. Links inside folders are not followed. Files that cannot be read and, with
    `text_only`, files with a NUL in their first 8 KiB are reported in `skipped`; a file given by
    name is taken as it is, and raises when it cannot be read.

    Raises:
        DataError: a path does not exist or cannot be read, or two files have the same name.
    """
    files: list[Source] = []
    skipped: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            _walk(path, pattern, text_only, files, skipped, prefix=path.resolve().name)
            continue
        source = _source(path.name, path, text_only=False, follow=True)
        if isinstance(source, str):
            raise DataError(f"{path} cannot be used as text", source, "name readable files")
        files.append(source)
    return Sources(_by_name(files), tuple(skipped))


def standard_library() -> Sources:
    """The `*.py` files of the running Python's standard library, without site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Source] = []
    skipped: list[str] = []
    _walk(root, "*.py", True, files, skipped, prefix="stdlib")
    if not files:
        raise DataError(
            "this Python has no standard library sources on disk",
            f"no *.py file under {root}",
            "install them, or prepare a folder of text of your own",
        )
    return Sources(_by_name(files), tuple(skipped))


def split_held_out(files: Sequence[Source], fraction: float) -> tuple[list[Source], list[Source]]:
    """`(train, held_out)`: whole files, chosen by a hash of their names.

    A file is held out when the sha256 of its name, read as a number in [0, 1), is below `fraction`:
    adding files never moves another one. When that leaves a side empty, the file with the smallest
    (largest) hash fills it.

    Raises:
        DataError: one file only, and `fraction` > 0.
    """
    if fraction == 0:
        return list(files), []
    if len(files) < 2:
        raise DataError(
            "whole files are held out, and there are too few of them",
            f"{len(files)} file, held_out fraction {fraction}",
            "give more files, or a held_out fraction of 0",
        )
    ranked = sorted(files, key=lambda file: _hash(file.name))
    count = sum(_hash(file.name) < fraction for file in files)
    count = min(max(count, 1), len(files) - 1)
    held = {file.name for file in ranked[:count]}
    train = [file for file in files if file.name not in held]
    return train, [file for file in files if file.name in held]


def _hash(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / _HASH_SPAN


def _walk(
    root: Path,
    pattern: str,
    text_only: bool,
    files: list[Source],
    skipped: list[str],
    *,
    prefix: str,
) -> None:
    for path in root.rglob(pattern):
        relative = path.relative_to(root)
        inside_caches = {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts)
        if inside_caches or path.is_dir():
            continue
        source = _source(f"{prefix}/{relative.as_posix()}", path, text_only=text_only)
        if isinstance(source, str):
            skipped.append(f"{path}: {source}")
        else:
            files.append(source)


def _source(name: str, path: Path, *, text_only: bool, follow: bool = False) -> Source | str:
    """The file, or why it is passed over. A link counts only where the user named it."""
    try:
        status = path.stat(follow_symlinks=follow)
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if status.st_size == 0:
            return "empty"
        with path.open("rb") as file:
            if text_only and b"\0" in file.read(_PROBE_BYTES):
                return "not text: it holds NUL bytes"
            return Source(name, path, status.st_size)
    except OSError as error:
        return error.strerror or type(error).__name__


def _by_name(files: list[Source]) -> tuple[Source, ...]:
    ordered = sorted(files)
    for one, other in pairwise(ordered):
        if one.name == other.name:
            raise DataError(
                f"two files would have the name {one.name} in the store",
                f"{one.path} and {other.path}",
                "name their common folder instead",
            )
    return tuple(ordered)
