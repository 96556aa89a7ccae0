"""Sizes of a video diffusion transformer (models/vdt.py), and how its branches cross ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, NamedTuple

import torch

from xdist.cost.place import Block, Heads, Patches, Placement, Unpatches, place_switches
from xdist.errors import ConfigError

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SHARDINGS = ("dsp", "ulysses_both", "ulysses_one", "ring", "megatron_sp")
# Branches of a layer, in order.
BRANCHES = ("temporal", "spatial", "mlp")
# Channels of the input beside the video's own: whether a position is known, and the time.
EXTRA = 2


@dataclass(frozen=True)
class VDTConfig:
    """The model's sizes: keys of the sections [model] and [parallel] that this model reads.

    sizes: positions of a video, frames first, e.g. (16, 32, 32); patch: positions of a token along
    each dim (empty: 1); channels: of the video; depth: layers; sharding: one of `SHARDINGS`.
    """

    sizes: tuple[int, ...] = (8, 16, 16)
    patch: tuple[int, ...] = ()
    channels: int = 1
    dim: int = 64
    depth: int = 4
    head_dim: int = 32
    mlp_ratio: float = 2.0
    recompute: bool = True
    dtype: str = "float32"
    sharding: str = "dsp"

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or (self.patch and len(self.patch) != len(self.sizes)):
            raise ConfigError(
                "vdt needs frames and at least one dim of space, and a patch for each or none",
                f"sizes {self.sizes}, patch {self.patch}",
                "write e.g. sizes = [16, 32, 32] and patch = [1, 2, 2]",
            )
        if self.sharding not in SHARDINGS:
            raise ConfigError(
                f"vdt cannot be sharded as {self.sharding!r}", "", f"one of {', '.join(SHARDINGS)}"
            )

    @classmethod
    def of(cls, section: Any, parallel: Any = None) -> VDTConfig:
        """From the config's sections [model] and [parallel].

        Raises:
            ConfigError: sizes that do not fit, or model.options, of which it has none.
        """
        if section.options:
            raise ConfigError(
                "vdt has no options of its own", f"model.options has {sorted(section.options)}"
            )
        own = [one.name for one in fields(cls) if one.name != "sharding"]
        given = {} if parallel is None else {"sharding": parallel.grid}
        return cls(**{name: getattr(section, name) for name in own}, **given)

    @property
    def each_patch(self) -> tuple[int, ...]:
        """Positions of a token along each dim."""
        return self.patch or (1,) * len(self.sizes)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each dim."""
        return self.tokens_of(self.sizes)

    def tokens_of(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each dim of a video of other sizes; the last may be partly filled."""
        return tuple(-(-n // p) for n, p in zip(sizes, self.each_patch, strict=True))

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return round(self.mlp_ratio * self.dim)


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
    if config.sharding == "dsp":
        placed = placement(config, sizes, degree, dim).blocks
        steps = [Step(one.dim, one.strategy or "local") for one in placed[1:-1]]
        return Route(placed[0].dim, steps, placed[-1].dim)
    steps = [Step(dim, _way(config.sharding, name, dim)) for name in BRANCHES]
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
    first = Block("patches", taken, reach=(Patches(config.each_patch),), itemsize=size)
    last = Block(
        "unpatches",
        prod(config.each_patch) * given,
        reach=(Unpatches(config.each_patch, sizes),),
        itemsize=size,
        out_channels=given,
    )
    return [first, *layers, last]


def _way(sharding: str, branch: str, dim: int) -> str:
    if sharding == "megatron_sp":
        return "tensor"
    if branch == "mlp":
        return "local"
    mixes = (dim == 0) == (branch == "temporal")
    if sharding == "ulysses_both" or (sharding == "ulysses_one" and mixes):
        return "ulysses"
    return "ring" if mixes and sharding == "ring" else "local"
