"""What an attention layer costs beside its kernels, where the shard's layers share what is counted
and where each counts for itself."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from packing import documents
from torch import Tensor

import xdist
from xdist.testing import RankPool
from xdist_kernels.attention import torch as kernels

TITLE = "Counting once a shard"
NOTE = (
    "CPU time of one rank of two in forward and backward of one attention layer whose kernels are "
    "taken out, 2 heads of 2: what is left is checks, needs, spans, the choice, and messages. "
    "alone: each layer counts for itself; shared: the layers of one shard share it. Balanced "
    "layout, packed rows; medians of 9 interleaved pairs of layers, in milliseconds."
)
LENGTHS = (32768, 262144)
STRATEGIES = ("auto", "ring", "ulysses", "gather")
PAIRS = 9


def _forward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])


def _backward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def times(length: int, strategy: str, pairs: int) -> list[tuple[float, float]]:
    """Seconds of CPU of (a layer alone, a layer that shares), on this rank."""
    mesh = xdist.init_mesh(ring=2)
    cuts = documents(0, length)
    layout = xdist.Layout.balanced(cuts, 2)
    kept = xdist.SequenceShard(mesh, layout, cuts)
    fresh = [xdist.SequenceShard(mesh, layout, cuts) for _ in range(pairs + 1)]
    size = (1, kept.local_length, 2, 2)
    q, k, v = (torch.zeros(size, requires_grad=True) for _ in range(3))

    def seconds(shard: xdist.SequenceShard) -> float:
        begun = time.thread_time()
        out = xdist.attention(q, k, v, shard, mask=xdist.Mask(), strategy=strategy)
        out.sum().backward()
        return time.thread_time() - begun

    with (
        mock.patch.object(kernels, "attention_forward", _forward),
        mock.patch.object(kernels, "attention_backward", _backward),
    ):
        found = [(seconds(one), seconds(kept)) for one in fresh]
    return found[1:]  # the first pair warms up, and fills what is kept


def run(root: Path, lengths: tuple[int, ...] = LENGTHS, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One row a length and strategy."""
    rows = []
    with RankPool(2) as pool:
        for length in lengths:
            for strategy in STRATEGIES:
                found = pool.run(times, length, strategy, pairs)[0]
                alone, shared = (1e3 * statistics.median(x) for x in zip(*found, strict=True))
                rows.append(
                    {
                        "tokens": length,
                        "strategy": strategy,
                        "alone (ms)": alone,
                        "shared (ms)": shared,
                        "shared / alone": shared / alone,
                    }
                )
    return rows
