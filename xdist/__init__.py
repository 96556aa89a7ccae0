"""xdist: train on sequences too long for one device.

Public names are loaded on first use (PEP 562), so that `import xdist` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "init_mesh": "xdist.mesh",
    "Mesh": "xdist.mesh",
    "SequenceShard": "xdist.shard",
    "GridShard": "xdist.grid_shard",
    "Layout": "xdist.layout",
    "Mask": "xdist.mask",
    "Dropout": "xdist.dropout",
    "attention": "xdist.ops",
    "linear_attention": "xdist.ops",
    "ssd": "xdist.ops",
    "delta_rule": "xdist.ops",
    "recurrence": "xdist.ops",
    "bidirectional": "xdist.ops",
    "Recurrence": "xdist.parallel.recurrence",
    "selective_scan": "xdist.ops",
    "grid_scan": "xdist.ops",
    "prefix_attention": "xdist.ops",
    "causal_conv1d": "xdist.ops",
    "conv_nd": "xdist.ops",
    "conv_sizes": "xdist.cost.conv_nd",
    "neighborhood_attention": "xdist.ops",
    "window_attention": "xdist.ops",
    "grid_attention": "xdist.ops",
    "axial_attention": "xdist.ops",
    "cross_entropy": "xdist.ops",
    "mean": "xdist.ops",
    "switch": "xdist.ops",
    "reduce_gradients": "xdist.train.gradients",
    "clip_grad_norm": "xdist.train.gradients",
    "checks": "xdist.comm",
}
_ROOMS = (
    "comm",
    "config",
    "errors",
    "memory",
    "nn",
    "testing",
    "certify",
    "plan",
    "models",
    "train",
)

__all__ = [*_HOME, *_ROOMS]  # noqa: PLE0604 - the tables above hold strings only


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"xdist.{name}")
    raise AttributeError(f"module 'xdist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__])
