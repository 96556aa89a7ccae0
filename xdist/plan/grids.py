"""Models of grids before they run: bytes, memory and where they switch.

Their layers choose among many ways to cross ranks by counted bytes, so the plan calls the model
itself, on tensors of the meta device, which have shapes and no values, as one of the ranks of a
world that is imagined (`Mesh.imagined`): every exchange is counted by the ledger that counts those
of a run, nothing is computed or sent, and it can be done beside a real world. That the moves cost
what the formulas of `xdist.cost` say is held by the tests of each op.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch

from xdist.config import Config, Stage
from xdist.cost.conv_nd import patch_windows
from xdist.cost.engine import engine_moves, held_bytes
from xdist.cost.model import SUM_BYTES
from xdist.cost.moves import Moved, reduce_bytes, window_bytes
from xdist.cost.place import Placement
from xdist.grid_shard import GridShard
from xdist.layout import Layout
from xdist.mesh import Mesh
from xdist.models import build, sizes_of
from xdist.plan.memory import Work, initial_heap, memory_of
from xdist.plan.rehearsal import DTYPES, Rehearsed, rehearse
from xdist.plan.result import Memory, Moves, StagePlan

STEP_NUMBERS = 5
LABEL_BYTES = 8
# Tokens of a rank and row that are rehearsed at most: a layer's tiles are gone through one by one,
# at a few seconds for this many. Larger samples are rehearsed smaller, and counted by formulas.
MOST_TOKENS = 4096


def rehearsed(config: Config, stage: Stage, rank: int) -> Rehearsed:
    """One micro-step of a stage on world rank `rank`."""
    model, parallel = sizes_of(config.model, config.parallel), config.parallel
    degrees = (config.data_degree, parallel.ring, parallel.ulysses)
    rows, whole = stage.batch // config.data_degree, stage.crop or config.model.sizes
    sizes = smaller(whole, model, parallel.sequence_ranks)
    found = _rehearsed(model, sizes, rows, rank, degrees, parallel.dim)
    if sizes == whole:
        return found
    # Of the smaller sample: activations grow with positions, and moves are not those of this one.
    factor = prod(whole) / prod(sizes)
    fixed = 2 * found.parameter_bytes
    return Rehearsed(
        by_formula(config, stage, rank),
        round(found.flops * factor),
        round(found.kept_bytes * factor),
        round((found.peak_bytes - fixed) * factor) + fixed,
        found.parameter_bytes,
    )


def smaller(sizes: tuple[int, ...], model: Any, ranks: int) -> tuple[int, ...]:
    """The sizes that are rehearsed: these, or as much smaller along each dim as `MOST_TOKENS` asks
    for, in whole patches."""
    tokens = model.tokens_of(sizes)
    if prod(tokens) <= MOST_TOKENS * ranks or not follows_placement(model):
        return sizes
    factor = (MOST_TOKENS * ranks / prod(tokens)) ** (1 / len(sizes))
    patch = model.patch or (1,) * len(sizes)
    return tuple(max(int(n * factor), 1) * p for n, p in zip(tokens, patch, strict=True))


def follows_placement(model: Any) -> bool:
    """Whether the model goes as `place_switches` says: only then formulas say what it moves."""
    return getattr(model, "sharding", "dsp") == "dsp"


def by_formula(config: Config, stage: Stage, rank: int) -> Moves:
    """What a micro-step moves where the model's blocks are placed, without a rehearsal: exactly
    that, where the model follows its placement (a test holds it)."""
    placement, parallel = placement_of(config, stage), config.parallel
    place, ranks = rank % parallel.sequence_ranks, config.ranks
    moved = placement.moved[place]
    sent, received = moved.sent_bytes, moved.received_bytes
    if config.data.kind == "volume":
        straddling = _straddling(config, stage, place)
        sent, received = sent + straddling.sent_bytes, received + straddling.received_bytes
    else:
        # Its first block makes patches of the samples themselves, which have no gradient.
        first = placement.blocks[0]
        for passes in (first.switch[place], first.inside[place]):
            sent -= passes.backward.sent_bytes
            received -= passes.backward.received_bytes
    blocks = Moved(sent, received)
    return {"blocks": blocks, "reduce": reduce_bytes(1, ranks, rank, SUM_BYTES)}


def _straddling(config: Config, stage: Stage, rank: int) -> Moved:
    """Values and labels of patches that two ranks hold parts of; a segmenter's placement begins
    behind them."""
    model, dim = sizes_of(config.model, config.parallel), config.parallel.dim
    sizes = stage.crop or config.model.sizes
    ranks, size = config.parallel.sequence_ranks, sizes[dim]
    layout = Layout.contiguous(size, ranks)
    windows = patch_windows(size, model.patch[dim], ranks)
    other = stage.batch // config.data_degree * prod(sizes) // size
    each = DTYPES[model.dtype].itemsize
    values = window_bytes(layout, windows, rank, other * model.channels, each)
    return values + window_bytes(layout, windows, rank, other, LABEL_BYTES)


def placement_of(config: Config, stage: Stage) -> Placement:
    """Where the model switches samples of a stage."""
    found: Placement = _model(sizes_of(config.model, config.parallel)).placement(
        config.parallel.sequence_ranks,
        sizes=stage.crop or config.model.sizes,
        dim=config.parallel.dim,
        batch=stage.batch // config.data_degree,
    )
    return found


@lru_cache(maxsize=8)
def _model(model: Any) -> Any:
    """The model without values."""
    with torch.device("meta"):
        return build(model)


@lru_cache(maxsize=64)
def _rehearsed(
    model: Any,
    sizes: tuple[int, ...],
    rows: int,
    rank: int,
    degrees: tuple[int, int, int],
    dim: int,
) -> Rehearsed:
    data, ring, ulysses = degrees
    mesh = Mesh.imagined(rank, data=data, ring=ring, ulysses=ulysses)
    return rehearse(model, sizes, rows, mesh, dim)


def grid_step(config: Config, stage: Stage, rank: int) -> tuple[Moves, Memory]:
    """What world rank `rank` moves in one optimizer step of a stage, and its predicted peak."""
    from xdist.plan.step import units_of

    times, ranks = config.train.accumulation, config.ranks
    units = units_of(config)
    total: Moves = {"reduce": reduce_bytes(STEP_NUMBERS, ranks, rank, SUM_BYTES)}
    step = rehearsed(config, stage, rank)
    for moves in (
        engine_moves(config.engine, units, ranks, rank, times),
        *[step.moves] * times,
    ):
        for name, moved in moves.items():
            total[name] = total.get(name, Moved()) + moved
    works = [_work(config, one, rank) for one in _until(config, stage)]
    held = held_bytes(config.engine, config.optimizer, units, ranks)
    memory = memory_of(held, works, initial_heap(config, units))
    return {name: moved for name, moved in total.items() if any(moved)}, memory


def _until(config: Config, stage: Stage) -> list[Stage]:
    """The stages up to this one: each may leave its heap behind."""
    stages = config.train.curriculum
    return [*stages[: stages.index(stage)], stage] if stage in stages else [stage]


def _work(config: Config, stage: Stage, rank: int) -> Work:
    """What a stage needs beside parameters, gradients and state."""
    step = rehearsed(config, stage, rank)
    # A rehearsal holds whole parameters and gradients, whatever the engine.
    beside = step.peak_bytes - 2 * step.parameter_bytes
    transients = max(beside - step.kept_bytes, 0)
    ahead = config.data.prefetch * _sample_bytes(config, stage, rank)
    return Work(step.kept_bytes + ahead, transients, 0)


def _sample_bytes(config: Config, stage: Stage, rank: int) -> int:
    """Values and labels of the batch that this rank reads, as they wait."""
    parallel, model = config.parallel, config.model
    mesh = Mesh.imagined(
        rank, data=config.data_degree, ring=parallel.ring, ulysses=parallel.ulysses
    )
    gshard = GridShard(mesh, stage.crop or model.sizes, parallel.dim)
    rows, count = stage.batch // config.data_degree, 1
    for size in gshard.local_sizes:
        count *= size
    each = 4 * model.channels + 8 if config.data.kind == "volume" else 4 * (2 * model.channels + 2)
    return rows * count * each


def grid_stage(config: Config, stage: Stage) -> StagePlan:
    """The plan of one stage of a model of grids."""
    steps = [grid_step(config, stage, rank) for rank in range(config.ranks)]
    times = config.train.accumulation
    return StagePlan(
        length=config.tokens_of(stage),
        batch=stage.batch,
        steps=stage.steps,
        moves=[moves for moves, _ in steps],
        memory=[memory for _, memory in steps],
        flops=[times * rehearsed(config, stage, rank).flops for rank in range(config.ranks)],
        library=[Moved()] * config.ranks,
    )


def placements(config: Config) -> list[str]:
    """Where the model switches at each stage, and why: the tables of its placements."""
    lines, told = [], set()
    for stage in config.train.curriculum:
        sizes, rows = stage.crop or config.model.sizes, stage.batch // config.data_degree
        if (sizes, rows) in told:
            continue
        told.add((sizes, rows))
        lines.append(f"samples of {' x '.join(map(str, sizes))} positions, {rows} a data rank")
        lines += [f"  {line}" for line in placement_of(config, stage).table().splitlines()]
    return lines
