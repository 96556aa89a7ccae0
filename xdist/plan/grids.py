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

from xdist.config import Config, Stage
from xdist.cost.dsp import METHODS
from xdist.cost.engine import engine_moves, held_bytes
from xdist.cost.model import SUM_BYTES
from xdist.cost.moves import Moved, reduce_bytes
from xdist.grid_shard import GridShard
from xdist.layout import even_sizes
from xdist.mesh import Mesh
from xdist.models import sizes_of
from xdist.plan.grid_moves import by_formula, follows_placement, placement_of
from xdist.plan.memory import Work, initial_heap, memory_of
from xdist.plan.rehearsal import Rehearsed, rehearse
from xdist.plan.result import Memory, Moves, StagePlan

STEP_NUMBERS = 5
# Tokens of a rank and row that are rehearsed at most: a layer's tiles are gone through one by one,
# at a few seconds for this many. Larger samples are rehearsed smaller, and counted by formulas
# (xdist/plan/grid_moves.py).
MOST_TOKENS = 4096


def rehearsed(config: Config, stage: Stage, rank: int) -> Rehearsed:
    """One micro-step of a stage on world rank `rank`."""
    model, whole = sizes_of(config.model, config.parallel), stage.crop or config.model.sizes
    sizes = smaller(whole, model, config.parallel.sequence_ranks)
    found = _rehearsed_of(config, stage, rank, sizes)
    if sizes == whole:
        return found
    # Of the smaller sample: activations grow with positions, and moves are not those of this one.
    factor = prod(whole) / prod(sizes)
    fixed = 2 * found.parameter_bytes
    return Rehearsed(
        by_formula(config, stage, rank),
        _flops(config, stage, rank, sizes),
        round(found.kept_bytes * factor),
        round((found.peak_bytes - fixed) * factor) + fixed,
        found.parameter_bytes,
    )


def smaller(sizes: tuple[int, ...], model: Any, ranks: int, part: int = 1) -> tuple[int, ...]:
    """The sizes that are rehearsed: these, or as much smaller along each dim as `MOST_TOKENS` asks
    for, in whole patches; part: by this much less.

    No dim becomes smaller than the ranks, so that each holds some wherever the model switches.
    """
    tokens = model.tokens_of(sizes)
    most = MOST_TOKENS * ranks // part
    if prod(tokens) <= most:
        return sizes
    least = [min(n, ranks) for n in tokens]
    free, factor = set(range(len(tokens))), 1.0
    while free:
        held = prod(n for d, n in enumerate(least) if d not in free)
        factor = (most / held / prod(tokens[d] for d in free)) ** (1 / len(free))
        short = {d for d in free if int(tokens[d] * factor) < least[d]}
        if not short:
            break
        free -= short
    chosen = [int(n * factor) if d in free else least[d] for d, n in enumerate(tokens)]
    return tuple(min(n * p, size) for n, p, size in zip(chosen, model.patch, sizes, strict=True))


def _flops(config: Config, stage: Stage, rank: int, sizes: tuple[int, ...]) -> int:
    """Of the whole sample, from rehearsals of smaller ones.

    What attends over dims grows with the tokens and with those of the dims, all else with the
    tokens; two rehearsals tell how much is which.
    """
    model, ranks = sizes_of(config.model, config.parallel), config.parallel.sequence_ranks
    whole = stage.crop or config.model.sizes
    least = smaller(whole, model, ranks, 8)
    tokens, attended = _grown(config, stage, rank, sizes)
    all_tokens, all_attended = _grown(config, stage, rank, whole)
    flops = _rehearsed_of(config, stage, rank, sizes).flops
    few, few_attended = _grown(config, stage, rank, least)
    bend = attended / tokens - few_attended / few
    each = 0.0
    if bend:
        rise = flops / tokens - _rehearsed_of(config, stage, rank, least).flops / few
        each = min(max(rise / bend, 0.0), flops / attended)
    return round((flops - each * attended) / tokens * all_tokens + each * all_attended)


def _grown(config: Config, stage: Stage, rank: int, sizes: tuple[int, ...]) -> tuple[float, float]:
    """This rank's tokens of a sample of these sizes, and the pairs times channels of its
    attention."""
    model, parallel = sizes_of(config.model, config.parallel), config.parallel
    tokens = model.tokens_of(sizes)
    ranks, along = parallel.sequence_ranks, tokens[parallel.dim]
    share = even_sizes(along, ranks)[rank % ranks] / along
    if getattr(model, "strategy", "") == "megatron_sp":
        share = 1 / ranks  # of heads and hidden channels, at all tokens
    pairs = 0
    for placed in placement_of(config, stage.model_copy(update={"crop": sizes})).blocks:
        if placed.block.whole:
            each = placed.block.channels * prod(placed.sizes[d] for d in placed.block.whole)
            pairs += prod(placed.sizes) * each
    return share * prod(tokens), share * pairs


def _rehearsed_of(config: Config, stage: Stage, rank: int, sizes: tuple[int, ...]) -> Rehearsed:
    """The stage's rows of samples of these sizes."""
    model, parallel = sizes_of(config.model, config.parallel), config.parallel
    degrees = (config.data_degree, parallel.ring, parallel.ulysses)
    rows = stage.batch // config.data_degree
    return _rehearsed(model, sizes, rows, rank, degrees, parallel.dim)


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
    """Where the model switches at each stage, and why: the tables of its placements; one line for
    a model that does not switch."""
    model = sizes_of(config.model, config.parallel)
    if not follows_placement(model):
        way = METHODS[model.strategy]
        return [
            f"{way} (parallel.grid = {model.strategy}): dim {config.parallel.dim} stays sharded in "
            "every block, none is placed"
        ]
    lines, told = [], set()
    for stage in config.train.curriculum:
        sizes, rows = stage.crop or config.model.sizes, stage.batch // config.data_degree
        if (sizes, rows) in told:
            continue
        told.add((sizes, rows))
        lines.append(f"samples of {' x '.join(map(str, sizes))} positions, {rows} a data rank")
        lines += [f"  {line}" for line in placement_of(config, stage).table().splitlines()]
    return lines
