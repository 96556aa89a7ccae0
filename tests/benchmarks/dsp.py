"""One video model sharded in five ways: bytes, time of the moves alone, and of whole steps.

The moves of a step are recorded and then sent once more by themselves, message by message, each
waited for: what a rank spends on the transport, without what it spends waiting for a slower rank's
work. Ring hides part of it behind work, which the whole step shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xdist
from xdist.comm import collectives, ledger
from xdist.models.vdt import SHARDINGS, VDT, VDTConfig, build
from xdist.testing import RankPool

TITLE = "One video diffusion transformer, sharded in five ways"
NOTE = (
    "Videos of 16 x 48 x 48 and 16 x 64 x 64 positions, 3 channels, in patches of 1 x 2 x 2, width "
    "128, 8 heads, 2 layers of a temporal and a spatial attention and an MLP, float32, one row, "
    "one thread a rank; sharded by frames. sent: bytes of the busiest rank, forward and backward. "
    "moves: the recorded messages of a step sent once more without any work between them, the "
    "slowest rank of each of 21 interleaved rounds: median and least. dsp / row: the part that dsp "
    "needs of the bytes, or of the median time of the moves, of the method that the row names. "
    "step: forward and backward, interleaved rounds, median of the slowest rank; gradients are not "
    "reduced, which is the same for all. With more ranks than cores, steps of 4 ranks share the "
    "cores. Megatron-SP here is its pattern of moves, with the MLP split as well; parameters are "
    "held whole."
)
CONFIGS = tuple(
    VDTConfig(
        sizes=sizes, patch=(1, 2, 2), channels=3, depth=2, head_dim=16, recompute=False, dim=128
    )
    for sizes in ((16, 48, 48), (16, 64, 64))
)
ROUNDS = 5
REPLAYS = 21
RANKS = (2, 4)
Messages = list[tuple[dict[int, int], dict[int, int]]]


@contextmanager
def recorded() -> Iterator[Messages]:
    """Bytes sent to and received from each rank, one entry an exchange."""
    found: Messages = []
    post = collectives._post

    def noting(buffers: Any, *rest: Any) -> Any:
        found.append(
            (
                {rank: x.nbytes for rank, x in buffers.sends.items()},
                {rank: x.nbytes for rank, x in buffers.receives.items()},
            )
        )
        return post(buffers, *rest)

    collectives._post = noting
    try:
        yield found
    finally:
        collectives._post = post


def replay_s(messages: Messages, group: Any) -> float:
    """Seconds to send and receive them all, one exchange after another."""
    byte = torch.uint8
    sends = [{r: torch.zeros(n, dtype=byte) for r, n in out.items()} for out, _ in messages]
    torch.distributed.barrier()
    begun = time.perf_counter()
    for out, (_, into) in zip(sends, messages, strict=True):
        specs = {rank: ((size,), byte) for rank, size in into.items()}
        collectives.start_pairs(out, specs, group, move="replay").wait()
    return time.perf_counter() - begun


def step_s(model: VDT, x: Tensor, noise: Tensor, gshard: xdist.GridShard) -> float:
    """Seconds of a forward and a backward, begun together."""
    torch.distributed.barrier()
    begun = time.perf_counter()
    model.loss(x, noise, gshard).backward()
    return time.perf_counter() - begun


def measured(config: VDTConfig, rounds: int) -> dict[str, dict[str, Any]]:
    """On one rank, by way to shard: bytes sent, and seconds of moves and of steps by round."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    gshard = xdist.GridShard(mesh, config.sizes)
    generator = torch.Generator().manual_seed(gshard.rank)
    x = torch.randn(1, *gshard.local_sizes, config.channels + 2, generator=generator)
    x[..., -2], x[..., -1] = 0.0, 0.5
    noise = torch.randn(1, *gshard.local_sizes, config.channels, generator=generator)
    models = {name: build(replace(config, strategy=name), seed=0) for name in SHARDINGS}
    messages: dict[str, Messages] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        with recorded() as messages[name], ledger() as moved:
            step_s(model, x, noise, gshard)
        found[name] = {"sent": moved.sent_bytes}
    for name in SHARDINGS:
        found[name] |= {"moves": [], "steps": []}
    # Apart from the steps, so that all methods send under the same conditions.
    for name in _by_turns(REPLAYS):
        found[name]["moves"].append(replay_s(messages[name], gshard.group))
    for name in _by_turns(rounds):
        found[name]["steps"].append(step_s(models[name], x, noise, gshard))
    return found


def _by_turns(rounds: int) -> Iterator[str]:
    """Every method once a round, each time beginning with another one."""
    for number in range(rounds):
        turn = number % len(SHARDINGS)
        yield from SHARDINGS[turn:] + SHARDINGS[:turn]


def run(
    root: Path,
    configs: Sequence[VDTConfig] = CONFIGS,
    rounds: int = ROUNDS,
    ranks: tuple[int, ...] = RANKS,
) -> list[dict[str, Any]]:
    """One row a number of ranks, a size and a way to shard."""
    rows = []
    for count in ranks:
        with RankPool(count) as pool:
            for config in configs:
                rows += rows_of(config, count, pool.run(measured, config, rounds))
    return rows


def rows_of(
    config: VDTConfig, count: int, found: list[dict[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of one size on `count` ranks, of what each measured."""
    sent = {name: max(rank[name]["sent"] for rank in found) for name in SHARDINGS}
    moves = {name: _slowest(found, name, "moves") for name in SHARDINGS}
    usual = {name: statistics.median(times) for name, times in moves.items()}
    steps = {name: statistics.median(_slowest(found, name, "steps")) for name in SHARDINGS}
    tokens = prod(config.grid)
    return [
        {
            "ranks, tokens, way": f"{count}, {tokens:,}, {name}",
            "sent (MB)": sent[name] / 1e6,
            "moves (ms)": 1e3 * usual[name],
            "least (ms)": 1e3 * min(moves[name]),
            "dsp / row, bytes": sent["dsp"] / sent[name],
            "dsp / row, moves": usual["dsp"] / usual[name],
            "step (s)": steps[name],
            "tokens / s": tokens / steps[name],
        }
        for name in SHARDINGS
    ]


def _slowest(found: list[dict[str, Any]], name: str, what: str) -> list[float]:
    """Seconds of the slowest rank, by round."""
    return [max(times) for times in zip(*(rank[name][what] for rank in found), strict=True)]
