"""Attention over ranks against vanilla attention, factor by factor, and how far each reaches.

The algorithmic factor is that of blockwise attention over one that keeps the scores, on one rank;
the parallel factor that of two ranks over one, blockwise on both. They multiply. The reach is the
greatest length, in steps of a half, of which forward and backward stay within LIMIT_GIB a process,
which is run, not extrapolated: blockwise over documents of 1 Ki, so that a row ends in minutes.
They do not change what it holds.

    make bench BENCH=vanilla
    ROWS="4Ki 8Ki" make bench BENCH=vanilla       these lengths; ROWS=reach only the reach;
                                                  the other rows of the table stay
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import torch
from peers_measure import MEMORY_ENVIRONMENT, _pass, _reset_peak, _status, drawn
from peers_methods import Attention, Sizes
from torch import Tensor

import xdist
from xdist.testing import RankPool

TITLE = "Blockwise and distributed attention against vanilla attention"
LIMIT_GIB = 8
NOTE = (
    "Causal, forward and backward, float32, 8 heads of 64, one thread a rank. vanilla computes the "
    "scores of all pairs, the masked softmax and the product with the values, and autograd keeps "
    "what it needs. blockwise is xdist.attention on one rank; two ranks are strategy ulysses on "
    "contiguous shares. algorithmic = vanilla / blockwise, parallel = blockwise / two ranks (at "
    "most 2), medians of interleaved rounds. reach: the greatest length tried that stays within 8 "
    "GiB a process, inputs, outputs and gradients included, and the peak there; two ranks hold "
    "half of the length each; blockwise reads documents of 1 Ki there. Peaks are resident "
    "sets of processes of their own."
)
HEADS = 8
DOCUMENT = 1024
KI, GIB = 1024, 2**30
LENGTHS = (1 * KI, 2 * KI, 4 * KI, 8 * KI)
ROUNDS = 7
PATH = record.FOLDER / "vanilla.json"


def vanilla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(scale * q k^T) v` `[B,n,H,D]` with every score, causal."""
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    scores = q_ @ k_.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_).transpose(1, 2)


def blockwise(sizes: Sizes) -> Attention:
    """xdist's attention on however many ranks there are, contiguous shares."""
    ranks = xdist.rank.read_rank().world_size
    mesh = xdist.init_mesh(ulysses=ranks)
    layout = xdist.Layout.contiguous(sizes.tokens, ranks)
    shard = xdist.SequenceShard(mesh, layout, documents=sizes.cu_seqlens)
    mask = xdist.Mask(causal=True)
    return lambda q, k, v: xdist.attention(q, k, v, shard, mask=mask)


def _share(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rank = xdist.rank.read_rank()
    layout = xdist.Layout.contiguous(sizes.tokens, rank.world_size)
    return drawn(sizes, list(layout.segments(rank.rank)))


def seconds(sizes: Sizes, kind: str, rounds: int) -> list[float]:
    """Wall seconds of passes on this rank; the first is not counted."""
    import time

    attention, share = vanilla if kind == "vanilla" else blockwise(sizes), _share(sizes)
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        _pass(attention, share)
        found.append(time.perf_counter() - start)
    return found[1:]


def peak(sizes: Sizes, kind: str) -> int:
    """The highest resident set of forward and backward and of what they read and give, in bytes,
    over that of the process after a small pass."""
    few = Sizes(512, HEADS, HEADS)
    _pass(vanilla if kind == "vanilla" else blockwise(few), _share(few))
    before = _reset_peak()
    attention = vanilla if kind == "vanilla" else blockwise(sizes)
    _pass(attention, _share(sizes))
    return (_status("VmHWM") - before) * KI


def _timed(lengths: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    with RankPool(1) as one, RankPool(2) as two:
        for tokens in lengths:
            sizes = Sizes(tokens, HEADS, HEADS)
            times: dict[str, list[float]] = {"vanilla": [], "blockwise": [], "two": []}
            for number in range(rounds):
                arms = list(times)[:: 1 if number % 2 else -1]
                for arm in arms:
                    pool = two if arm == "two" else one
                    times[arm].append(max(t[0] for t in pool.run(seconds, sizes, arm, 1)))
            whole, part, both = (statistics.median(t) for t in times.values())
            yield {
                "row": f"{tokens // KI}Ki tokens",
                "vanilla, one rank": f"{whole:.3g} s",
                "blockwise, one rank": f"{part:.3g} s",
                "blockwise, two ranks": f"{both:.3g} s",
                "algorithmic factor": _median_ratio(times["vanilla"], times["blockwise"]),
                "parallel factor": _median_ratio(times["blockwise"], times["two"]),
            }


def _median_ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def reach(kind: str, ranks: int, limit_bytes: int, first: int) -> tuple[int, int]:
    """The greatest length tried that stays within the limit, and its peak in bytes.

    Doubles from `first` until a length needs more, or is guessed from the last peak to need far
    more; then tries one and a half of the last that fitted. Twice the length is guessed to take
    twice the memory, or four times where the scores are kept.
    """
    growth = 4.0 if kind == "vanilla" else 2.0
    best = (0, 0)
    tokens = first
    while best[1] * growth * 0.9 <= limit_bytes:
        taken = _peak_of(kind, ranks, tokens)
        if taken > limit_bytes:
            break
        best = tokens, taken
        tokens *= 2
    half = best[0] * 3 // 2
    if half == 0 or best[1] * growth**0.585 * 0.9 > limit_bytes:
        return best
    taken = _peak_of(kind, ranks, half)
    return (half, taken) if taken <= limit_bytes else best


def _peak_of(kind: str, ranks: int, tokens: int) -> int:
    documents = max(1, tokens // DOCUMENT) if kind != "vanilla" else 1
    kept = dict(os.environ)
    os.environ.update(MEMORY_ENVIRONMENT)
    try:
        with RankPool(ranks) as pool:
            sizes = Sizes(tokens, HEADS, HEADS, documents=documents)
            return max(pool.run(peak, sizes, kind))
    finally:
        os.environ.clear()
        os.environ.update(kept)


def run(
    root: Path, limit_bytes: int = LIMIT_GIB * GIB, first: int = 2 * KI, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Rows of time by length, then the reach."""
    asked = os.environ.get("ROWS", "").split()
    lengths = [n for n in LENGTHS if not asked or f"{n // KI}Ki" in asked]
    rows = list(_timed(lengths, rounds))
    if not asked or "reach" in asked:
        arms = {"vanilla, one rank": ("vanilla", 1), "blockwise, one rank": ("blockwise", 1)}
        arms["blockwise, two ranks"] = ("blockwise", 2)
        found = {title: reach(*arm, limit_bytes, first) for title, arm in arms.items()}
        said = {t: f"{n / KI:g}Ki ({b / GIB:.2f} GiB)" for t, (n, b) in found.items()}
        lengths_ = [n for n, _ in found.values()]
        factors = {
            "algorithmic factor": lengths_[1] / max(1, lengths_[0]),
            "parallel factor": lengths_[2] / max(1, lengths_[1]),
        }
        rows.append({"row": f"reach in {limit_bytes / GIB:g} GiB a process", **said, **factors})
    measured = {row["row"] for row in rows}
    kept = [row for row in _known() if row["row"] not in measured] if asked else []
    return sorted(kept + rows, key=lambda row: (len(row["row"]), row["row"]))


def _known() -> list[dict[str, Any]]:
    if not PATH.exists():
        return []
    found: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["rows"]
    return found
