"""`xdist certify CONFIG`: the model of a config on the rank counts of its section [certify]."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn

from xdist.certify.grids import certify_grids
from xdist.certify.judge import Report
from xdist.certify.run import certify
from xdist.config import Config, Model, Parallel, Stage
from xdist.cost.model import SUM_BYTES
from xdist.cost.moves import reduce_bytes
from xdist.mesh import Mesh
from xdist.models import build, sizes_of
from xdist.plan import pass_bytes, rehearse
from xdist.plan.grid_moves import by_formula
from xdist.plan.step import parameter_count
from xdist.testing import RankPool

BATCH = 2
STREAM = "stream"  # an option of models of grids: the dtype between layers
# At a short length a whole share would fit one tile; certified are the borders between tiles too.
TILES = 8


def certify_config(config: Config, *, pools: Mapping[int, RankPool] | None = None) -> Report:
    """Certifies the model of a config, at `certify.length` tokens, with bytes against the plan.

    A model of grids at `certify.sizes`, sharded first along each dim. Degrees are those of
    [parallel] where the count of sequence ranks is the same, otherwise ring = count. With
    data.documents = "separate" the sequence is cut into documents. Precision bfloat16 is certified
    beside float64 and float32 when the config trains in it.
    """
    if config.data.kind != "text":
        return _certify_grids(config, pools)
    length, parallel = config.certify.length, config.parallel
    documents = None
    if config.data.documents == "separate":
        # Cuts at no multiple of anything, one empty document, one that starts a segment.
        cuts = sorted({0, length // 7, length // 3, length // 2, length - 1, length})
        documents = tuple(sorted([*cuts, length // 3]))
    degrees = {parallel.sequence_ranks: (parallel.ring, parallel.ulysses)}
    tile_tokens = min(config.train.tile_tokens, max(1, length // TILES))
    extra = ("bfloat16",) if config.train.precision == "bfloat16" else ()

    def planned(ranks: int, precision: str) -> list[int]:
        ring, ulysses = degrees.get(ranks, (ranks, 1))
        changed = {"data": 1, "ring": ring, "ulysses": ulysses}
        here = config.model_copy(update={"parallel": parallel.model_copy(update=changed)})
        return pass_bytes(here, length, BATCH, precision=precision, documents=documents)

    return certify(
        functools.partial(_model, config.model, config.parallel, tile_tokens * BATCH),
        vocab_size=config.model.vocab_size,
        length=length,
        ranks=config.certify.ranks,
        batch=BATCH,
        seed=config.run.seed,
        layout=parallel.layout,
        documents=documents,
        dtypes=("float64", "float32", *extra),
        degrees=degrees,
        planned=planned,
        pools=pools,
    )


def _certify_grids(config: Config, pools: Mapping[int, RankPool] | None) -> Report:
    parallel, model = config.parallel, config.model
    sizes = config.certify.sizes or model.sizes
    degrees = {parallel.sequence_ranks: (parallel.ring, parallel.ulysses)}

    def planned(ranks: int, precision: str, dim: int) -> list[int]:
        ring, ulysses = degrees.get(ranks, (ranks, 1))
        changed = {"data": 1, "ring": ring, "ulysses": ulysses, "dim": dim}
        here = config.model_copy(
            update={
                "model": _in_dtype(model, precision),
                "parallel": parallel.model_copy(update=changed),
                "launch": config.launch.model_copy(update={"ranks": ranks}),
            }
        )
        return [_grid_bytes(here, sizes, rank) for rank in range(ranks)]

    return certify_grids(
        functools.partial(_model, model, parallel, 1),
        sizes=sizes,
        channels=model.channels,
        classes=model.classes if config.data.kind == "volume" else 0,
        ranks=config.certify.ranks,
        batch=BATCH,
        seed=config.run.seed,
        degrees=degrees,
        planned=planned,
        pools=pools,
        note="in float64 without the narrow residual stream" if STREAM in model.options else "",
    )


def _in_dtype(section: Model, dtype: str) -> Model:
    """The model with its parameters in `dtype`; in float64 its residual stream too.

    A stream that is rounded to fewer bits hides in its rounding what float64 is to show.
    """
    options = dict(section.options)
    if dtype == "float64":
        options.pop(STREAM, None)
    return section.model_copy(update={"dtype": dtype, "options": options})


def _grid_bytes(config: Config, sizes: tuple[int, ...], rank: int) -> int:
    """What a rank sends in forward, backward and gradient sum, where the loss counts its own
    positions."""
    parallel = config.parallel
    count = parameter_count(config)
    each = 8 if config.model.dtype == "float64" else 4
    sent = reduce_bytes(count, config.ranks, rank, each).sent_bytes
    # A rank that holds nothing may have to be told what the others know: no block's formula.
    if sizes[parallel.dim] < config.ranks:
        kind = sizes_of(config.model, parallel)
        mesh = Mesh.imagined(rank, ring=parallel.ring, ulysses=parallel.ulysses)
        moves = rehearse(kind, sizes, BATCH, mesh, parallel.dim, counted=True).moves
        return sent + sum(moved.sent_bytes for moved in moves.values())
    moves = by_formula(config, Stage(crop=sizes, batch=BATCH), rank)
    # The count travels on its own, or with the sum as one number more.
    numbers = [1, 1] if config.data.kind == "volume" else [2]
    sums = [reduce_bytes(n, config.ranks, rank, SUM_BYTES).sent_bytes for n in numbers]
    return sent + moves["blocks"].sent_bytes + sum(sums)


def _model(section: Model, parallel: Parallel, tile_tokens: int, precision: str) -> nn.Module:
    """The model with its parameters in the dtype that the precision asks for."""
    dtype = "float64" if precision == "float64" else "float32"
    return build(
        _in_dtype(section, dtype),
        precision=precision,
        tile_tokens=tile_tokens,
        parallel=parallel,
    )
