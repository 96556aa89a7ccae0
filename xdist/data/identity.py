"""What makes two stores the same data: lengths, content hashes, one fingerprint over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from xdist.errors import DataError

FORMAT = "xdist-text"
# Answers beside the tokens: who knows only text must not read it as text.
TASK_FORMAT = "xdist-task"
# Volumes, videos and flows: arrays of many dims.
GRID_FORMAT = "xdist-grid"
VERSION = 1


def fingerprint(facts: Mapping[str, Any]) -> str:
    """sha256 (hex) of `facts` as canonical JSON.

    `facts` holds the format, its version, the vocabulary size, the dtype and, per split, its length
    in tokens, its number of documents and the sha256 of tokens, document table and names; of a
    task also its name and options, and per split the sha256 of the labels. What a store of grids
    holds instead stands in `grid_store`.
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for each fact that differs, nested facts by dotted name."""
    found: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        one, other = old.get(name), new.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name}: {_short(one)} -> {_short(other)}")
    return found


def require_same_data(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, allow_change: bool = False
) -> list[str]:
    """Compare the data a checkpoint was trained on with the data at hand.

    Args:
        saved: `TextStore.identity` as the checkpoint's state holds it.
        current: `TextStore.identity` now.
        allow_change: go on in spite of a difference (`data.allow_fingerprint_change`).

    Returns:
        Lines to log: none when the data are the same, else what changed.

    Raises:
        DataError: the data differ and `allow_change` is false.
    """
    if saved["fingerprint"] == current["fingerprint"]:
        return []
    changed = differences(saved["facts"], current["facts"])
    told = (
        f"fingerprint {saved['fingerprint'][:16]}.. -> {current['fingerprint'][:16]}..; "
        + "; ".join(changed)
    )
    if allow_change:
        return [f"the data changed since the checkpoint, allowed by the config: {told}"]
    raise DataError(
        "the data changed since the checkpoint was written",
        told,
        "prepare the store from the same sources again, or set data.allow_fingerprint_change=true",
    )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:16]}.." if len(text) == 64 else text
