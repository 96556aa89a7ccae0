"""Stores of tokens and of grids, the order samples are drawn in, and each rank's own slice.

Names are loaded on first use: preparing a store needs no torch, drawing an order needs no zarr.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "TextStore": "xdist.data.store",
    "Split": "xdist.data.store",
    "prepare_text": "xdist.data.prepare",
    "prepare_task": "xdist.data.task_store",
    "standard_library": "xdist.data.sources",
    "sample_start": "xdist.data.order",
    "evaluation_windows": "xdist.data.order",
    "Loader": "xdist.data.loader",
    "Request": "xdist.data.loader",
    "Batch": "xdist.data.loader",
    "require_same_data": "xdist.data.identity",
    "GridRequest": "xdist.data.grid_loader",
    "GridBatch": "xdist.data.grid_loader",
    "GridStore": "xdist.data.grid_store",
    "GridSplit": "xdist.data.grid_store",
    "Degradation": "xdist.data.degrade",
    "part_box": "xdist.data.grid_box",
    "Volume": "xdist.data.volume",
    "prepare_volume": "xdist.data.volume",
    "Bouncing": "xdist.data.video",
    "prepare_video": "xdist.data.video",
    "Kolmogorov": "xdist.data.flow",
    "prepare_flow": "xdist.data.flow",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'xdist.data' has no attribute {name!r}")
