"""Sizes of a video diffusion transformer (models/vdt.py), and how its branches cross ranks."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

from xdist.cost.place import Block, Heads, Patches, Placement, Unpatches, place_switches
from xdist.errors import ConfigError
from xdist.models.grid_config import DTYPES, GridConfig
from xdist.models.vdt_inputs import EXTRA

SHARDINGS = ("dsp", "ulysses_both", "ulysses_one", "ring", "megatron_sp")
# Branches of a layer, in order.
BRANCHES = ("temporal", "spatial", "mlp")


@dataclass(frozen=True)
class VDTConfig(GridConfig):
    """The model's sizes; frames first in `sizes` and `patch`, then at least one dim of space.

    depth: layers, each a temporal and a spatial attention and an MLP; strategy: one of
    `SHARDINGS`.
    """

    dim: int = 64
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")

    strategy: str = "dsp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sizes) < 2:
            raise ConfigError(
                "vdt needs frames and at least one dim of space",
                f"sizes {self.sizes}",
                "write e.g. sizes = [16, 32, 32]",
            )
        if self.strategy not in SHARDINGS:
            raise ConfigError(
                f"vdt cannot be sharded as {self.strategy!r}",
                f"parallel.grid is one of {', '.join(SHARDINGS)}",
                "choose one of those",
            )


class Step(NamedTuple):
    """How one branch crosses ranks: the dim that is sharded in it, and its way."""

    dim: int
    way: str


class Route(NamedTuple):
    """The sharded dim while patches are made, the steps of all branches, the dim at the end."""

    first: int
    steps: list[Step]
    last: int

    def of_layer(self, number: int) -> list[Step]:
        """The steps of one layer's branches."""
        return self.steps[len(BRANCHES) * number : len(BRANCHES) * (number + 1)]


def route(config: VDTConfig, sizes: tuple[int, ...], degree: int, dim: int) -> Route:
    """How a video of `sizes` positions, sharded along `dim`, goes through the model."""
    if config.strategy == "dsp":
        placed = placement(config, sizes, degree, dim).blocks
        steps = [Step(one.dim, one.strategy or "local") for one in placed[1:-1]]
        return Route(placed[0].dim, steps, placed[-1].dim)
    steps = [Step(dim, _way(config.strategy, name, dim)) for name in BRANCHES]
    return Route(dim, steps * config.depth, dim)


def placement(
    config: VDTConfig, sizes: tuple[int, ...], degree: int, dim: int, batch: int = 1
) -> Placement:
    """Where such a video is switched, with the bytes of `batch` rows; it comes and goes alike."""
    return place_switches(blocks_of(config, sizes), sizes, degree, start=dim, end=dim, batch=batch)


def blocks_of(config: VDTConfig, sizes: tuple[int, ...]) -> list[Block]:
    """What each block needs whole or reaches: the planner's view of the model."""
    size = DTYPES[config.dtype].itemsize
    heads = Heads(config.dim // config.head_dim, config.head_dim)
    whole = {"temporal": (0,), "spatial": tuple(range(1, len(sizes)))}
    layers = [
        Block(
            f"{name} {number}",
            config.dim,
            whole.get(name, ()),
            heads if name in whole else None,
            itemsize=size,
        )
        for number in range(config.depth)
        for name in BRANCHES
    ]
    taken, given = config.channels + EXTRA - 1, config.channels
    first = Block("patches", taken, reach=(Patches(config.patch),), itemsize=size)
    last = Block(
        "unpatches",
        prod(config.patch) * given,
        reach=(Unpatches(config.patch, sizes),),
        itemsize=size,
        out_channels=given,
    )
    return [first, *layers, last]


def _way(strategy: str, branch: str, dim: int) -> str:
    if strategy == "megatron_sp":
        return "tensor"
    if branch == "mlp":
        return "local"
    mixes = (dim == 0) == (branch == "temporal")
    if strategy == "ulysses_both" or (strategy == "ulysses_one" and mixes):
        return "ulysses"
    return "ring" if mixes and strategy == "ring" else "local"
