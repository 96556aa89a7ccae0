"""How much of a slow exchange of a convolution's edges is hidden behind the rest of its outputs.

Two ranks with one thread each. The delivery of the edges is held back by DELAY_S, on both ranks, in
both directions: hidden = 1 - waited / DELAY_S.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import xdist
from xdist.comm.pending import Pending
from xdist.parallel import conv_nd
from xdist.testing import RankPool

TITLE = "The edges of a convolution behind the rest of it"
NOTE = (
    "Depthwise, 3 x 3 x 3, two ranks with one thread each, each with half of a volume of 100 x 117 "
    "x 95 voxels and 32 channels, float32. Every message is delivered late on both ranks. time is "
    "the slower rank's median of 7, waited is how long it waited for late messages, hidden = 1 - "
    "waited / delay."
)
DELAY_S = 0.02
SIZES, CHANNELS, PASSES = (100, 117, 95), 32, 7


@contextmanager
def _delayed(delay_s: float) -> Iterator[list[float]]:
    """Edges arrive `delay_s` after they were asked for; gives the seconds waited."""
    waited: list[float] = []

    def held_back(start: Callable[..., Pending[Any]]) -> Callable[..., Pending[Any]]:
        def started(*args: Any, **options: Any) -> Pending[Any]:
            pending = start(*args, **options)
            due = time.monotonic() + delay_s

            def finish() -> Any:
                waited.append(max(0.0, due - time.monotonic()))
                time.sleep(waited[-1])
                return pending.wait()

            return Pending(finish)

        return started

    names = ("start_edges", "start_edges_adjoint")
    known = {name: getattr(conv_nd, name) for name in names}
    for name, start in known.items():
        setattr(conv_nd, name, held_back(start))
    try:
        yield waited
    finally:
        for name, start in known.items():
            setattr(conv_nd, name, start)


def times(dim: int) -> dict[str, list[tuple[float, float, float]]]:
    """On one rank, by direction and pass: seconds without and with the delay, seconds waited."""
    gshard = xdist.GridShard(xdist.init_mesh(ring=2), SIZES, dim)
    x = torch.randn(1, *gshard.local_sizes, CHANNELS, requires_grad=True)
    weight = torch.randn(CHANNELS, 1, 3, 3, 3, requires_grad=True)
    dout = torch.randn_like(x)

    def seconds(delay_s: float) -> list[tuple[float, float]]:
        with _delayed(delay_s) as waited:
            torch.distributed.barrier()
            begun = time.monotonic()
            out = xdist.conv_nd(x, weight, None, gshard, groups=CHANNELS)
            forward = time.monotonic() - begun, sum(waited)
            waited.clear()
            torch.distributed.barrier()
            begun = time.monotonic()
            torch.autograd.grad(out, [x, weight], dout)
            return [forward, (time.monotonic() - begun, sum(waited))]

    found: dict[str, list[tuple[float, float, float]]] = {"forward": [], "backward": []}
    for number in range(-1, PASSES):  # one to warm up
        order = (0.0, DELAY_S) if number % 2 else (DELAY_S, 0.0)
        row = {delay_s: seconds(delay_s) for delay_s in order}
        if number >= 0:
            for place, direction in enumerate(found):
                found[direction].append((row[0.0][place][0], *row[DELAY_S][place]))
    return found


def run(root: Path) -> list[dict[str, Any]]:
    """One row a sharded dim and direction."""
    rows = []
    with RankPool(2) as pool:
        for dim in (0, 2):
            ranks = pool.run(times, dim)
            for direction in ("forward", "backward"):
                medians = [
                    [statistics.median(x) for x in zip(*one[direction], strict=True)]
                    for one in ranks
                ]
                plain, slow, waited = max(medians, key=lambda one: one[1])
                rows.append(
                    {
                        "sharded": f"dim {dim}, {direction}",
                        "time (s)": plain,
                        "with a delay (s)": slow,
                        "delay (s)": DELAY_S,
                        "waited (s)": waited,
                        "hidden (%)": 100 * (1 - waited / DELAY_S),
                    }
                )
    return rows
