"""A whole config, stage by stage and rank by rank: bytes, memory, FLOPs.

One step makes the passes of its micro-steps (cost/model.py), and for each the sum of the losses;
then one reduce of five float64 (valid tokens, bad rows, failures, stop, saved parts) and one of
all gradients over data x sequence. Clipping sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from xdist.config import Config, Stage
from xdist.cost.engine import Units, engine_moves, held_bytes
from xdist.cost.fsdp import Held
from xdist.cost.model import SUM_BYTES, loss_bytes
from xdist.cost.moves import Moved, reduce_bytes
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.plan.grids import grid_stage, grid_step, placements
from xdist.plan.memory import initial_heap, memory_of, work_of
from xdist.plan.model import (
    element_bytes,
    flops_per_token,
    meta_model,
    pass_moves,
    passes,
    sizes,
)
from xdist.plan.result import Memory, Moves, Plan, StagePlan
from xdist.plan.zero import zero_traffic

STEP_NUMBERS = 5
# A state crosses every border of segments where documents are joined: the most that can move.
JOINED = None


def plan(config: Config) -> Plan:
    """The plan of every stage, for `config.ranks` ranks. Needs no process group."""
    stages, of_grids = config.train.curriculum, config.data.kind != "text"
    made = [grid_stage(config, stage) if of_grids else _stage(config, stage) for stage in stages]
    notes = placements(config) if of_grids else []
    return Plan(config.ranks, parameter_count(config), made, notes)


def step_bytes(config: Config, stage: Stage) -> list[int]:
    """Bytes each rank sends in one optimizer step of a stage; its ledger, exactly, where
    documents are joined. Documents kept separate cut states off, so this is then the most."""
    return [rank_bytes(config, stage, rank) for rank in range(config.ranks)]


def rank_bytes(
    config: Config,
    stage: Stage,
    rank: int,
    documents: Sequence[Sequence[int] | None] | None = None,
) -> int:
    """Bytes world rank `rank` sends in one step, exactly.

    documents: the `cu_seqlens` of each micro-step on this data rank; None where documents are
    joined.
    """
    return _sent(step_moves(config, stage, rank, documents))


def peak_memory(config: Config, stage: Stage) -> list[int]:
    """Predicted peak memory of each rank in one step of a stage, bytes."""
    return [step_memory(config, stage, rank).peak_bytes for rank in range(config.ranks)]


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

    documents: `cu_seqlens`, None for one document.
    """
    parts = config.parallel.sequence_ranks
    dtype = "float64" if precision == "float64" else "float32"
    section = config.model.model_copy(update={"dtype": dtype})
    model = sizes(config.model_copy(update={"model": section}))
    layout, cuts = layout_of(config, length, parts), _cuts(documents, length)
    count = parameter_count(config)
    found = []
    for rank in range(parts):
        moves = pass_moves(model, layout, cuts, rank, rows, config.parallel.ulysses)
        reduced = loss_bytes(parts, rank, counted=True)
        reduced += reduce_bytes(count, parts, rank, element_bytes(model))
        found.append(_sent(moves | {"reduce": reduced}))
    return found


def layout_of(config: Config, length: int, parts: int) -> Layout:
    """The layout that the config names, over `parts` sequence ranks."""
    if config.parallel.layout == "zigzag":
        return Layout.zigzag(length, parts)
    return Layout.contiguous(length, parts)


def parameter_count(config: Config) -> int:
    """Trained parameters of the config's model."""
    return units_of(config).elements


def units_of(config: Config) -> Units:
    """The parameters of the config's model, by what fsdp gathers together."""
    return _units(sizes(config))


@lru_cache(maxsize=8)
def _units(of: Any) -> Units:
    model = meta_model(of)
    blocks = [tuple(block.parameters()) for block in model.blocks]
    inside = {id(p) for block in blocks for p in block}
    rest = tuple(p for p in model.parameters() if id(p) not in inside)
    roles = model.parameter_roles()
    return Units(
        tuple(_held(block) for block in blocks),
        _held(rest),
        sum(p.numel() for name, p in model.named_parameters() if roles[name] == "hidden"),
    )


def _held(unit: Sequence[torch.nn.Parameter]) -> tuple[Held, ...]:
    return tuple(Held(tuple(p.shape), p.requires_grad, p.element_size()) for p in unit)


def _cuts(documents: Sequence[int] | None, length: int) -> tuple[int, ...]:
    return Documents.of(documents, length).cu_seqlens


def _sent(moves: Moves) -> int:
    return sum(moved.sent_bytes for moved in moves.values())


def _stage(config: Config, stage: Stage) -> StagePlan:
    ranks = range(config.ranks)
    model = sizes(config)
    per_token = passes(model) * flops_per_token(model, stage.length)
    rows = stage.batch // config.data_degree * config.train.accumulation
    tokens = [rows * _share(config, stage, rank) for rank in ranks]
    return StagePlan(
        length=stage.length,
        batch=stage.batch,
        steps=stage.steps,
        moves=[step_moves(config, stage, rank) for rank in ranks],
        memory=[step_memory(config, stage, rank) for rank in ranks],
        flops=[per_token * count for count in tokens],
        library=[library_moves(config, rank) for rank in ranks],
    )


def step_moves(
    config: Config,
    stage: Stage,
    rank: int,
    documents: Sequence[Sequence[int] | None] | None = None,
    *,
    engine: bool = True,
) -> Moves:
    """What world rank `rank` sends and receives in one optimizer step, by move of xdist.

    documents: as in `rank_bytes`; engine: whether moves that the engine makes through xdist are
    part of it.
    """
    if config.data.kind != "text":
        return grid_step(config, stage, rank)[0]
    parts, ranks = config.parallel.sequence_ranks, config.ranks
    model = sizes(config)
    layout = layout_of(config, stage.length, parts)
    total: Moves = {"reduce": reduce_bytes(STEP_NUMBERS, ranks, rank, SUM_BYTES)}
    if engine:
        times = config.train.accumulation
        _add(total, engine_moves(config.engine, units_of(config), ranks, rank, times))
    rows = stage.batch // config.data_degree
    for cut in documents or [JOINED] * config.train.accumulation:
        cuts = _cuts(cut, stage.length)
        moves = pass_moves(model, layout, cuts, rank % parts, rows, config.parallel.ulysses)
        moves["reduce"] = loss_bytes(ranks, rank, counted=False)
        _add(total, moves)
    return {name: moved for name, moved in total.items() if any(moved)}


def _add(total: Moves, more: Moves) -> None:
    for name, moved in more.items():
        total[name] = total.get(name, Moved()) + moved


def library_moves(config: Config, rank: int) -> Moved | None:
    """What the engine's library itself exchanges in one step, beside the ledger; none for plain
    and fsdp, whose exchanges are moves of xdist; None where it is not known."""
    if config.engine.name != "deepspeed" or config.ranks == 1:
        return Moved()
    return zero_traffic(config)


def step_memory(config: Config, stage: Stage, rank: int) -> Memory:
    """Predicted memory of world rank `rank` in one step of a stage, part by part.

    Earlier stages of the curriculum count for what they leave behind.
    """
    if config.data.kind != "text":
        return grid_step(config, stage, rank)[1]
    stages = config.train.curriculum
    upto = stages[: stages.index(stage)] if stage in stages else ()
    parts = config.parallel.sequence_ranks
    works = [
        work_of(
            config,
            one.batch // config.data_degree,
            layout_of(config, one.length, parts),
            rank % parts,
        )
        for one in [*upto, stage]
    ]
    units = units_of(config)
    held = held_bytes(config.engine, config.optimizer, units, config.ranks)
    return memory_of(held, works, initial_heap(config, units))


def _share(config: Config, stage: Stage, rank: int) -> int:
    """Tokens of one sequence on this rank."""
    parts = config.parallel.sequence_ranks
    return layout_of(config, stage.length, parts).local_length(rank % parts)
