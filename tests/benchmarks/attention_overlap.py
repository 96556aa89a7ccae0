"""How much of a slow ring is hidden behind local work, on two ranks.

Every message is delivered DELAY_S after it was asked for. hidden = 1 - waited / delayed: waited is
what is left of a delay when the rank has done what it can do without the message.
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
from xdist.parallel.attention_blocks import Blocks
from xdist.testing import RankPool

DELAY_S = 0.2
TOKENS = 8192  # a rank
HEADS, DIM = 4, 64
PAIRS = 5
MOVES = ("start_keys", "start_gradients")


@contextmanager
def delayed(delay_s: float) -> Iterator[dict[str, float]]:
    """Blocks arrive `delay_s` after they were asked for; gives the seconds waited, by move."""
    waited = dict.fromkeys(MOVES, 0.0)
    known = {name: getattr(Blocks, name) for name in MOVES}

    def held_back(name: str) -> Callable[..., Pending[Any]]:
        def started(*args: Any) -> Pending[Any]:
            pending, due = known[name](*args), time.monotonic() + delay_s

            def finish() -> Any:
                rest = max(0.0, due - time.monotonic())
                waited[name] += rest
                time.sleep(rest)
                return pending.wait()

            return Pending(finish)

        return started

    for name in MOVES:
        setattr(Blocks, name, held_back(name))
    try:
        yield waited
    finally:
        for name, start in known.items():
            setattr(Blocks, name, start)


def times(tokens: int, pairs: int) -> list[dict[str, float]]:
    """On one rank, for each pair: seconds by direction without and with the delay, and waited."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.zigzag(2 * tokens, 2))
    q, k, v, dout = (torch.randn(1, tokens, HEADS, DIM) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()

    def seconds(delay: float) -> dict[str, float]:
        with delayed(delay) as forward:
            torch.distributed.barrier()
            begun = time.monotonic()
            out = xdist.attention(q, k, v, shard, mask=xdist.Mask(), strategy="ring")
            first = time.monotonic() - begun
        with delayed(delay) as backward:
            torch.distributed.barrier()
            begun = time.monotonic()
            torch.autograd.grad(out, (q, k, v), dout)
            second = time.monotonic() - begun
        return {
            "forward": first,
            "backward": second,
            "forward, keys": forward["start_keys"],
            "backward, keys": backward["start_keys"],
            "backward, gradients": backward["start_gradients"],
        }

    found = []
    for pair in range(-1, pairs):  # one to warm up
        order = (0.0, DELAY_S) if pair % 2 else (DELAY_S, 0.0)
        row = {delay: seconds(delay) for delay in order}
        plain = {f"{name}, plain": row[0.0][name] for name in ("forward", "backward")}
        if pair >= 0:
            found.append({**row[DELAY_S], **plain})
    return found


def run(root: Path, tokens: int = TOKENS, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One row a move: the slower rank's medians."""
    with RankPool(2) as pool:
        ranks = pool.run(times, tokens, pairs)

    def slowest(name: str) -> float:
        return max(statistics.median(pair[name] for pair in rank) for rank in ranks)

    rows = []
    for name in ("forward, keys", "backward, keys", "backward, gradients"):
        direction, waited = name.split(",")[0], slowest(name)
        rows.append(
            {
                "move": name,
                "tokens a rank": tokens,
                "time (s)": slowest(f"{direction}, plain"),
                "with a delay (s)": slowest(direction),
                "delay (s)": DELAY_S,
                "waited (s)": waited,
                "hidden (%)": 100 * (1 - waited / DELAY_S),
            }
        )
    return rows
