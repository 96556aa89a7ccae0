"""Names of checkpoint folders, and what a crash may have left beside them.

step-00000120                a checkpoint, complete
.tmp-step-00000120-x7f..     being written; worthless after a crash
.old-step-00000120-x7f..     moved out of the way of a new save of the same step; put back
                             when the new one never arrived
.gone-step-00000100-x7f..    being deleted
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_STEP = re.compile(r"step-(\d{8,})")
_STALE = re.compile(r"\.(tmp|old|gone)-(step-\d{8,})-\w+")


def folder_name(step: int) -> str:
    """The folder of the checkpoint at `step`."""
    return f"step-{step:08}"


def steps_in(directory: Path) -> dict[int, Path]:
    """Checkpoint folders by step, newest first, unchecked. Times of files play no part."""
    if not directory.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := _STEP.fullmatch(path.name)) and path.name == folder_name(int(match[1]))
    }
    return dict(sorted(found.items(), reverse=True))


def clean_stale(directory: str | Path) -> list[str]:
    """Remove what an interrupted save left, and put back what it had moved out of its way.

    Call on one rank, before any rank loads, and while nobody saves. Returns a line for each.
    """
    directory = Path(directory)
    lines: list[str] = []
    if not directory.is_dir():
        return lines
    for path in sorted(directory.iterdir()):
        match = _STALE.fullmatch(path.name)
        if match is None or path.is_symlink():
            continue
        target = directory / match[2]
        if match[1] == "old" and not target.exists():
            os.replace(path, target)
            lines.append(f"put {target.name} back: the save that was to replace it did not finish")
        else:
            shutil.rmtree(path)
            lines.append(f"removed {path.name}, left by an interrupted save")
    if lines:
        flush_folder(directory)
    return lines


def flush_folder(path: Path) -> None:
    """Make the entries of a folder (creations and renames in it) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
