"""A causal ring on two ranks: zigzag shares beside contiguous ones, interleaved."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

import xdist
from xdist.testing import RankPool

LENGTHS = (8192, 16384)  # tokens of both ranks together
HEADS = ((4, 4), (8, 2))
DIM = 64
PAIRS = 9
LAYOUTS = ("contiguous", "zigzag")


def times(length: int, heads: tuple[int, int], pairs: int) -> list[tuple[float, ...]]:
    """On one rank, for each pair: seconds of forward and backward, contiguous then zigzag."""
    mesh = xdist.init_mesh(ring=2)
    shards = {
        name: xdist.SequenceShard(mesh, getattr(xdist.Layout, name)(length, 2)) for name in LAYOUTS
    }
    tokens = length // 2
    q, dout = (torch.randn(1, tokens, heads[0], DIM) for _ in range(2))
    k, v = (torch.randn(1, tokens, heads[1], DIM) for _ in range(2))
    for x in (q, k, v):
        x.requires_grad_()

    def seconds(name: str) -> float:
        torch.distributed.barrier()
        begun = time.monotonic()
        out = xdist.attention(q, k, v, shards[name], mask=xdist.Mask(), strategy="ring")
        torch.autograd.grad(out, (q, k, v), dout)
        torch.distributed.barrier()
        return time.monotonic() - begun

    found = []
    for pair in range(-1, pairs):  # one to warm up
        order = LAYOUTS if pair % 2 else LAYOUTS[::-1]
        row = {name: seconds(name) for name in order}
        if pair >= 0:
            found.append(tuple(row[name] for name in LAYOUTS))
    return found


def run(root: Path, lengths: tuple[int, ...] = LENGTHS, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One row a length and head count: medians, and the spread of the pairs' ratio."""
    rows = []
    with RankPool(2) as pool:
        for length in lengths:
            for heads in HEADS:
                # Both ranks leave the last barrier together: either one's times are the pair's.
                found = pool.run(times, length, heads, pairs)[0]
                ratios = sorted(zigzag / contiguous for contiguous, zigzag in found)
                contiguous, zigzag = (statistics.median(x) for x in zip(*found, strict=True))
                rows.append(
                    {
                        "tokens": length,
                        "heads": f"{heads[0]} over {heads[1]}",
                        "contiguous (s)": contiguous,
                        "zigzag (s)": zigzag,
                        "zigzag / contiguous": statistics.median(ratios),
                        "lowest": ratios[0],
                        "highest": ratios[-1],
                    }
                )
    return rows
