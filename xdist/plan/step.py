"""A whole config, stage by stage and rank by rank: bytes, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from xdist.config import Config, Stage
from xdist.models import build
from xdist.models.hybrid_lm import HybridConfig, flops_per_token
from xdist.plan.memory import memory_of
from xdist.plan.result import Memory, Moves, Plan, StagePlan
from xdist.plan.traffic import (
    STEP_NUMBERS,
    SUM_BYTES,
    Pass,
    add,
    layout_of,
    pass_moves,
    reduce_traffic,
)


def plan(config: Config) -> Plan:
    """The plan of every stage, for `config.ranks` ranks. Needs no process group."""
    stages = config.train.curriculum
    return Plan(config.ranks, parameter_count(config), [_stage(config, stage) for stage in stages])


def step_bytes(config: Config, stage: Stage) -> list[int]:
    """Bytes each rank sends in one optimizer step of a stage: equal to its ledger, exactly."""
    ranks = range(config.ranks)
    return [sum(t.sent_bytes for t in _step_moves(config, stage, r).values()) for r in ranks]


def peak_memory(config: Config, stage: Stage) -> list[int]:
    """Predicted peak memory of each rank in one step of a stage, bytes."""
    return [_memory(config, stage, rank).peak_bytes for rank in range(config.ranks)]


def pass_bytes(
    config: Config,
    length: int,
    rows: int,
    *,
    precision: str,
    documents: Sequence[int] | None = None,
) -> list[int]:
    """Bytes each sequence rank sends in forward, backward and gradient sum of `rows` sequences,
    where the model itself counts the valid tokens; what `xdist certify` runs.

    documents: `cu_seqlens`; the hybrid model's exchanges do not depend on them.
    """
    parts = config.parallel.sequence_ranks
    size = 8 if precision == "float64" else 4
    one = Pass(config.model, layout_of(config, length, parts), rows, size)
    found = []
    for rank in range(parts):
        moves = pass_moves(one, rank)
        # The count of valid tokens and the sum of the losses.
        for count, element in ((1, SUM_BYTES), (1, SUM_BYTES), (parameter_count(config), size)):
            add(moves, "reduce", reduce_traffic(count, element, parts, rank))
        found.append(sum(traffic.sent_bytes for traffic in moves.values()))
    return found


def parameter_count(config: Config) -> int:
    """Trained parameters of the config's model."""
    return _count(HybridConfig.of(config.model))


@lru_cache(maxsize=8)
def _count(sizes: HybridConfig) -> int:
    # On the meta device nothing is allocated.
    with torch.device("meta"):
        model = build(sizes)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _stage(config: Config, stage: Stage) -> StagePlan:
    ranks = range(config.ranks)
    per_token = flops_per_token(HybridConfig.of(config.model))
    # Backward is twice forward; every tile's forward is computed once more in it.
    rows = stage.batch // config.data_degree * config.train.accumulation
    tokens = [rows * _share(config, stage, rank) for rank in ranks]
    return StagePlan(
        length=stage.length,
        batch=stage.batch,
        steps=stage.steps,
        moves=[_step_moves(config, stage, rank) for rank in ranks],
        memory=[_memory(config, stage, rank) for rank in ranks],
        flops=[4 * per_token * count for count in tokens],
    )


def _step_moves(config: Config, stage: Stage, world_rank: int) -> Moves:
    parts, ranks = config.parallel.sequence_ranks, config.ranks
    element = 8 if config.model.dtype == "float64" else 4
    rows = stage.batch // config.data_degree
    one = Pass(config.model, layout_of(config, stage.length, parts), rows, element)
    total: Moves = {}
    for move, traffic in pass_moves(one, world_rank % parts).items():
        add(total, move, traffic * config.train.accumulation)
    for count, size, times in (
        (STEP_NUMBERS, SUM_BYTES, 1),
        (1, SUM_BYTES, config.train.accumulation),
        (parameter_count(config), element, 1),
    ):
        add(total, "reduce", reduce_traffic(count, size, ranks, world_rank) * times)
    return total


def _memory(config: Config, stage: Stage, world_rank: int) -> Memory:
    rows = stage.batch // config.data_degree
    share = _share(config, stage, world_rank)
    return memory_of(config, parameter_count(config), rows, share)


def _share(config: Config, stage: Stage, world_rank: int) -> int:
    """Tokens of one sequence on this rank."""
    parts = config.parallel.sequence_ranks
    return layout_of(config, stage.length, parts).local_length(world_rank % parts)
