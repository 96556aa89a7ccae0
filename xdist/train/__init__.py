"""Training: the loop, its engine, gradients of the global mean, and the record of a run."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "run": "xdist.train.loop",
    "reduce_gradients": "xdist.train.gradients",
    "clip_grad_norm": "xdist.train.gradients",
    "learning_rate": "xdist.train.schedule",
    "write_report": "xdist.train.report",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # On first use: a report needs no torch, a user's own loop needs only the gradients.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'xdist.train' has no attribute {name!r}")
