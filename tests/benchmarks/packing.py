"""Packed rows under each layout: work, tokens, runs and keys that travel. Counted, not timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xdist import Layout, Mask
from xdist.cost.attention_keys import Problem
from xdist.documents import Documents

TITLE = "Packed rows under each layout"
NOTE = (
    "Causal, rows packed with documents of log-normal length (median 600 tokens, sigma 1.3; one in "
    "forty is past 7,000), medians of 9 rows, the worst in brackets. work and tokens: the busiest "
    "rank over the mean. keys: those that travel in a ring's forward, over the row's tokens. ms: "
    "to compute the layout."
)
LENGTHS = (32768, 131072)
PARTS = (2, 4, 8)
ROWS = 9
MAKERS: dict[str, Callable[[list[int], int], Layout]] = {
    "contiguous": lambda cuts, parts: Layout.contiguous(cuts[-1], parts),
    "zigzag": lambda cuts, parts: Layout.zigzag(cuts[-1], parts),
    "balanced": Layout.balanced,
}


def documents(seed: int, length: int) -> list[int]:
    """cu_seqlens of one row."""
    draw = np.random.default_rng(seed)
    cuts = [0]
    while cuts[-1] < length:
        cuts.append(min(length, cuts[-1] + 1 + int(600 * np.exp(1.3 * draw.standard_normal()))))
    return cuts


def run(root: Path, lengths: tuple[int, ...] = LENGTHS, rows: int = ROWS) -> list[dict[str, Any]]:
    """One row a length, number of ranks and layout."""
    return [
        {"tokens": length, "ranks": parts, "layout": name, **_measured(name, length, parts, rows)}
        for length in lengths
        for parts in PARTS
        for name in MAKERS
    ]


def _measured(name: str, length: int, parts: int, rows: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {key: [] for key in ("work", "token share", "runs", "keys")}
    seconds = []
    for seed in range(rows):
        cuts = documents(seed, length)
        begun = time.perf_counter()
        layout = MAKERS[name](cuts, parts)
        seconds.append(time.perf_counter() - begun)
        packed = Documents.of(cuts, length)
        call = Problem(layout, packed, Mask(), layout, packed, False, 1, 1, 1, 8, 8, 2)
        work = call.pairs.sum(axis=1)
        found["work"].append(float(work.max() / work.mean()))
        found["token share"].append(max(layout.local_lengths) * parts / length)
        found["runs"].append(sum(len(layout.segments(rank)) for rank in range(parts)))
        found["keys"].append(sum(call.needs.received(rank) for rank in range(parts)) / length)
    told = {
        key: f"{statistics.median(values):.3g} ({max(values):.3g})" for key, values in found.items()
    }
    return {**told, "ms": 1e3 * statistics.median(seconds)}
