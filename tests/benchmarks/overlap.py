"""How much of a slow exchange of states is hidden behind local work, on two ranks.

The delivery of every message of a scan is held back by DELAY_S on the rank that needs it: forward
the second, backward the first. hidden = 1 - (waited / DELAY_S): waited is what is left of the delay
when the rank has done what it can do without the message.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from operations import OPERATIONS, Sizes, call, share

import xdist
from xdist.comm.pending import Pending
from xdist.parallel import recurrent_scan
from xdist.testing import RankPool

DELAY_S = 0.2
TOKENS = 1 << 15  # a rank
SIZES = Sizes(heads=8, key_dim=64, width=64)
CASES = ("linear_attention, scalar", "delta_rule, scalar", "selective_scan", "ssd")
PAIRS = 7
ALGORITHMS = ("gather", "chain")


@contextmanager
def delayed(delay_s: float, *, forward: bool, backward: bool) -> Iterator[list[float]]:
    """Messages of scans arrive `delay_s` after they were asked for; gives the seconds waited."""
    waited: list[float] = []

    def held_back(start: Callable[..., Pending[Any]]) -> Callable[..., Pending[Any]]:
        def started(*args: Any) -> Pending[Any]:
            pending = start(*args)
            due = time.monotonic() + delay_s

            def finish() -> Any:
                waited.append(max(0.0, due - time.monotonic()))
                time.sleep(waited[-1])
                return pending.wait()

            return Pending(finish)

        return started

    names = ["start_together"] * forward + ["start_adjoint_together"] * backward
    known = {name: getattr(recurrent_scan, name) for name in names}
    for name, start in known.items():
        setattr(recurrent_scan, name, held_back(start))
    try:
        yield waited
    finally:
        for name, start in known.items():
            setattr(recurrent_scan, name, start)


def times(name: str, algorithm: str, tokens: int, pairs: int) -> list[tuple[float, float, float]]:
    """On one rank, for each pair: seconds of the direction in which it waits, without and with the
    delay, and of those the seconds waited."""
    operation, mesh = OPERATIONS[name], xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(2 * tokens, 2))
    first = mesh.sequence_rank == 0
    start = mesh.sequence_rank * tokens
    drawn, dout = share(operation, start, start + tokens, torch.float32, SIZES)
    inputs = {name: x.requires_grad_() for name, x in drawn.items()}

    def seconds(delay: float) -> tuple[float, float]:
        with delayed(delay, forward=not first, backward=first) as waited:
            torch.distributed.barrier()
            begun = time.monotonic()
            out = call(operation, shard, inputs, strategy="scan", algorithm=algorithm)
            forward = time.monotonic() - begun
            torch.distributed.barrier()
            begun = time.monotonic()
            torch.autograd.grad(out, list(inputs.values()), dout)
            backward = time.monotonic() - begun
        return backward if first else forward, sum(waited)

    found = []
    for pair in range(-1, pairs):  # one to warm up
        order = (0.0, DELAY_S) if pair % 2 else (DELAY_S, 0.0)
        row = {delay: seconds(delay) for delay in order}
        if pair >= 0:
            found.append((row[0.0][0], *row[DELAY_S]))
    return found


def run(root: Path, tokens: int = TOKENS, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One row an operation, algorithm and direction."""
    rows = []
    with RankPool(2) as pool:
        for name, algorithm in product(CASES, ALGORITHMS):
            backward, forward = pool.run(times, name, algorithm, tokens, pairs)
            for direction, waiting in (("forward", forward), ("backward", backward)):
                plain, slow, waited = (statistics.median(x) for x in zip(*waiting, strict=True))
                rows.append(
                    {
                        "operation": f"{name}, {algorithm}, {direction}",
                        "tokens a rank": tokens,
                        "time (s)": plain,
                        "with a delay (s)": slow,
                        "delay (s)": DELAY_S,
                        "waited (s)": waited,
                        "hidden (%)": 100 * (1 - waited / DELAY_S),
                    }
                )
    return rows
