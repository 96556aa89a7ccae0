"""What a micro-step of a model of grids moves, by formula: for samples too large to rehearse."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch

from xdist.config import Config, Stage
from xdist.cost.conv_nd import patch_windows
from xdist.cost.dsp import Video, pair_bytes
from xdist.cost.model import SUM_BYTES
from xdist.cost.moves import Moved, reduce_bytes, window_bytes
from xdist.cost.place import Block, Passes, Placement
from xdist.cost.place_spot import Spot
from xdist.layout import Layout
from xdist.models import build, sizes_of
from xdist.models.grid_config import DTYPES
from xdist.models.vdt_plan import VDTConfig, blocks_of
from xdist.plan.result import Moves

LABEL_BYTES = 8


def follows_placement(model: Any) -> bool:
    """Whether the model of these sizes switches as `place_switches` says: all but a vdt whose
    `parallel.grid` is not dsp."""
    return getattr(model, "strategy", "dsp") == "dsp"


def by_formula(config: Config, stage: Stage, rank: int) -> Moves:
    """What a micro-step moves, without a rehearsal: exactly that, where every rank holds a position
    (tests hold it)."""
    place, ranks = rank % config.parallel.sequence_ranks, config.ranks
    model = sizes_of(config.model, config.parallel)
    if follows_placement(model):
        blocks = _placed(config, stage, place)
    else:
        blocks = _embedded(config, model, stage, place)
    return {"blocks": blocks, "reduce": reduce_bytes(1, ranks, rank, SUM_BYTES)}


def placement_of(config: Config, stage: Stage) -> Placement:
    """Where the model switches samples of a stage."""
    found: Placement = _model(sizes_of(config.model, config.parallel)).placement(
        config.parallel.sequence_ranks,
        sizes=stage.crop or config.model.sizes,
        dim=config.parallel.dim,
        batch=stage.batch // config.data_degree,
    )
    return found


def _placed(config: Config, stage: Stage, place: int) -> Moved:
    """Of a model that follows its placement."""
    placement = placement_of(config, stage)
    moved = placement.moved[place]
    sent, received = moved.sent_bytes, moved.received_bytes
    if config.data.kind == "volume":
        return Moved(sent, received) + _straddling(config, stage, place)
    # Its first block makes patches of the samples themselves, which have no gradient.
    first = placement.blocks[0]
    for passes in (first.switch[place], first.inside[place]):
        sent -= passes.backward.sent_bytes
        received -= passes.backward.received_bytes
    return Moved(sent, received)


def _embedded(config: Config, model: VDTConfig, stage: Stage, place: int) -> Moved:
    """Of a video model that leaves the sharded dim as it is: patches there, the pairs of every
    layer, patches apart again."""
    dim, degree = config.parallel.dim, config.parallel.sequence_ranks
    sizes, rows = stage.crop or config.model.sizes, stage.batch // config.data_degree
    tokens = model.tokens_of(sizes)
    first, *_, last = blocks_of(model, sizes)
    pair = pair_bytes(
        model.strategy,
        Video(
            tokens,
            model.dim // model.head_dim,
            model.head_dim,
            dim=dim,
            switch_to=0 if dim else 1,
            batch=rows,
            itemsize=first.itemsize,
        ),
        degree,
    )[place]
    ends = [_reached(one, grid, dim, degree, rows, place)
            for one, grid in ((first, sizes), (last, tokens))]  # fmt: skip
    # The samples themselves have no gradient.
    total = ends[0].forward + ends[1].forward + ends[1].backward
    for _ in range(model.depth):
        total += pair.forward + pair.backward
    return total


def _reached(
    block: Block, grid: tuple[int, ...], dim: int, degree: int, rows: int, place: int
) -> Passes:
    """What the reach of a block moves with `dim` sharded."""
    spot = Spot(grid, dim, degree, rows, block.channels, block.itemsize)
    return block.reach[0].options(spot)[0].moved[place]


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


@lru_cache(maxsize=8)
def _model(model: Any) -> Any:
    """The model without values."""
    with torch.device("meta"):
        return build(model)
