"""Checkpoints: safetensors and JSON, checksummed, complete or absent. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "save": "xdist.checkpoint.write",
    "Saver": "xdist.checkpoint.write",
    "Outcome": "xdist.checkpoint.write",
    "clean_stale": "xdist.checkpoint.folders",
    "Loaded": "xdist.checkpoint.read",
    "load": "xdist.checkpoint.read",
    "load_latest": "xdist.checkpoint.read",
    "SAVE_POINTS": "xdist.checkpoint.points",
    "Cut": "xdist.checkpoint.points",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'xdist.checkpoint' has no attribute {name!r}")
