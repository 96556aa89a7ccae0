"""One step of each stage on a few ranks of a world that does not exist.

The ranks are those of torch's fake process group, one after another in this process; tensors are
on the meta device. So degrees, mesh, model, shards and every exchange of a step are the real code
at the config's sizes, and nothing is computed. A step grows with the tokens of a rank, its
exchanges do not: a stage is cut to a few tiles a segment, and the result says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from xdist.comm.ledger import Ledger, ledger
from xdist.comm.reduce import start_reduce
from xdist.comm.worlds import fake_world
from xdist.config import Config, Engine, Stage
from xdist.cost.moves import Moved
from xdist.dry_run.result import DryRun, Rehearsal
from xdist.errors import ConfigError, XdistError
from xdist.mesh import Mesh, init_mesh
from xdist.models import build
from xdist.plan import plan, step_memory, step_moves
from xdist.plan.meta import MetaRun
from xdist.plan.step import STEP_NUMBERS, layout_of
from xdist.shard import SequenceShard
from xdist.train.gradients import reduce_gradients

# Eighths of a tile a segment, and micro-steps of a step, that are run at most.
EIGHTHS = 9
MICRO_STEPS = 2


def dry_run(config: Config) -> DryRun:
    """Try every stage of `config` on its first, middle and last rank, in this one process.

    A stage is shortened to at most one tile and an eighth a segment, that is to two tiles.

    Raises:
        ConfigError: what the mesh, the model or a shard refuses, as on real ranks.
        LaunchError: this process has a process group already.
        XdistError: a step moved other bytes than `xdist plan` says, which is a fault of xdist.
    """
    if config.data.kind != "text":
        raise ConfigError(
            f"a dry run knows no {config.model.kind}",
            "the plan of a model of grids is made by such a run already: each rank's step, without "
            "values, counted by the ledger",
            "use `xdist plan CONFIG` without --dry-run",
        )
    ranks = sorted({0, config.ranks // 2, config.ranks - 1})
    checked = _check_shares(config)
    found: list[Rehearsal] = []
    # Stages that are alike once shortened are run once.
    known: dict[tuple[int, int, int], Rehearsal] = {}
    for rank in ranks:
        for index, stage in enumerate(config.train.curriculum):
            shorter = shortened(config, stage)
            key = (rank, shorter.length, shorter.batch)
            if key not in known:
                known[key] = _rehearse(config, index, shorter, rank)
            once = known[key]
            cut = shorter.length < stage.length or once.micro_steps < config.train.accumulation
            found.append(dataclasses.replace(once, stage=index, shortened=cut))
    found.sort(key=lambda one: (one.stage, one.rank))
    result = DryRun(_title(config, ranks), found, checked + _checked(found), _unchecked(config))
    if result.differing:
        raise _disagreement(result)
    return result


def shortened(config: Config, stage: Stage) -> Stage:
    """The stage at the length that is run: each segment at most a tile and an eighth, with the
    same remainder over segments."""
    segments = config.parallel.sequence_ranks * (2 if config.parallel.layout == "zigzag" else 1)
    rows = stage.batch // config.data_degree
    per_tile = max(config.train.tile_tokens // rows, config.model.window or 0, 1)
    length = min(stage.length, segments * (per_tile * EIGHTHS // 8) + stage.length % segments)
    return stage.model_copy(update={"length": length})


def _rehearse(config: Config, index: int, stage: Stage, rank: int) -> Rehearsal:
    micro_steps = min(config.train.accumulation, MICRO_STEPS)
    train = config.train.model_copy(update={"accumulation": micro_steps})
    config = config.model_copy(update={"train": train})
    several = config.ranks > 1
    with (
        fake_world(rank, config.ranks) if several else contextlib.nullcontext(),
        ledger() as moved,
    ):
        mesh = _mesh(config)
        shard = SequenceShard(mesh, layout_of(config, stage.length, mesh.sequence_size))
        with MetaRun() as held:
            with torch.device("meta"):
                module = build(
                    config.model,
                    precision=config.train.precision,
                    tile_tokens=config.train.tile_tokens,
                    parallel=config.parallel,
                )
            _step(config, shard, stage.batch // mesh.data_size, module)
    # Every engine's rehearsal holds whole parameters.
    plain = config.model_copy(update={"engine": Engine()})
    memory = step_memory(plain, stage, rank)
    summed = memory.update if config.engine.name == "plain" else 0
    return Rehearsal(
        stage=index,
        rank=rank,
        length=stage.length,
        rows=stage.batch // config.data_degree,
        micro_steps=micro_steps,
        shortened=False,
        counted=_counted(moved),
        planned=step_moves(config, stage, rank, engine=config.engine.name == "plain"),
        exchanges=moved.calls,
        tensor_bytes=held.peak_bytes,
        planned_tensor_bytes=memory.tensors_bytes + summed,
    )


def _mesh(config: Config) -> Mesh:
    degrees = config.parallel
    if config.ranks == 1:
        return Mesh.one_rank("meta")
    return init_mesh(data=degrees.data, ring=degrees.ring, ulysses=degrees.ulysses, device="meta")


def _step(config: Config, shard: SequenceShard, rows: int, module: nn.Module) -> None:
    """The exchanges of one optimizer step in the order of the training loop."""
    empty = partial(torch.empty, device="meta")
    mesh, length, times = shard.mesh, shard.layout.length, config.train.accumulation
    start_reduce(empty(STEP_NUMBERS, dtype=torch.float64), mesh.parameter_group).wait()
    for _ in range(times):
        tokens, labels = empty(2, rows, shard.local_length, dtype=torch.int64)
        valid = length * rows * mesh.data_size * times
        loss: Tensor = module.loss(tokens, labels, shard, valid_tokens=valid)  # type: ignore[operator]
        loss.backward()
    if config.engine.name == "plain":
        reduce_gradients(module, mesh)


def _counted(moved: Ledger) -> dict[str, Moved]:
    traffic = {
        name: Moved(one.sent_bytes, one.received_bytes) for name, one in moved.by_move.items()
    }
    return {name: one for name, one in traffic.items() if any(one)}


def _check_shares(config: Config) -> list[str]:
    """The arithmetic of all ranks of all stages, without running them."""
    parts = config.parallel.sequence_ranks
    said = []
    for index, stage in enumerate(plan(config).stages):
        shares = layout_of(config, stage.length, parts).local_lengths
        rows = stage.batch // config.data_degree
        for name in sorted({name for moves in stage.moves for name in moves}):
            traffic = [moves[name] for moves in stage.moves if name in moves]
            sent, received = (sum(column) for column in zip(*traffic, strict=True))
            if sent != received:
                raise XdistError(
                    f"stage {index}: {name} sends {sent} bytes and receives {received}",
                    f"summed over {config.ranks} ranks, from the plan's formulas",
                    "this is a fault of xdist; please report it with the config",
                )
        said.append(
            f"stage {index}, all {config.ranks} ranks: {rows} sequence(s) a data rank, shares of "
            f"{min(shares):,} to {max(shares):,} tokens that add up to {sum(shares):,}; "
            "what is sent is received, move by move"
        )
    return said


def _title(config: Config, ranks: list[int]) -> str:
    degrees = config.parallel
    return (
        f"dry run: {config.ranks} rank(s), data {config.data_degree} x ring {degrees.ring} x "
        f"ulysses {degrees.ulysses}, engine {config.engine.name}; rank(s) "
        f"{', '.join(map(str, ranks))} one after another in this process, tensors without values"
    )


def _checked(found: list[Rehearsal]) -> list[str]:
    lines = ["mesh, groups, model, shards, forward and backward of the rows above ran"]
    lines.append("what the ledger counted there is what the plan says, move by move")
    if any(one.shortened for one in found):
        lines.append(
            "* shorter than the stage: at most a tile and an eighth of each segment and "
            f"{MICRO_STEPS} micro-steps were run, and compared with the plan of just that"
        )
    return lines


def _unchecked(config: Config) -> list[str]:
    lines = ["values, time, and the links between the ranks: nothing was computed or sent"]
    lines.append("clipping and the optimizer's update, which exchange nothing of xdist's own")
    lines.append("data.store, which was not opened; documents were taken as joined")
    if config.engine.name != "plain":
        lines.append(
            f"the engine {config.engine.name}: its partitioning and its own traffic need real "
            "ranks; `xdist plan` has them as far as formulas hold"
        )
    return lines


def _disagreement(result: DryRun) -> XdistError:
    one = result.differing[0]
    names = sorted(one.counted.keys() | one.planned.keys())
    why = ", ".join(
        f"{name}: counted {found}, planned {planned}"
        for name in names
        for found, planned in [(one.counted.get(name, Moved()), one.planned.get(name, Moved()))]
        if found != planned
    )
    return XdistError(
        f"dry run: rank {one.rank} moves other bytes in stage {one.stage} than planned",
        why,
        "this is a fault of xdist; please report it with the config",
    )
