"""Checkpoints: safetensors and JSON, checksummed, complete or absent. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Piece": "xdist.checkpoint.pieces",
    "Spec": "xdist.checkpoint.pieces",
    "save": "xdist.checkpoint.write",
    "clean_stale": "xdist.checkpoint.folders",
    "Checkpoint": "xdist.checkpoint.read",
    "Loaded": "xdist.checkpoint.read",
    "load": "xdist.checkpoint.read",
    "load_latest": "xdist.checkpoint.read",
    "open_checkpoint": "xdist.checkpoint.read",
    "open_latest": "xdist.checkpoint.read",
    "SAVE_POINTS": "xdist.checkpoint.points",
    "Cut": "xdist.checkpoint.points",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'xdist.checkpoint' has no attribute {name!r}")
