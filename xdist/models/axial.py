"""Axial attention for volumes: every position sees its line along one dim, dim after dim.

    each layer, dim by dim: x = x + attention along that dim (norm(x));   x = x + mlp(norm(x))

Three such attentions let every voxel see every other at the cost of lines. Ho et al., "Axial
Attention in Multidimensional Transformers" (2019), section 3. Positions along each dim are told by
a depthwise convolution in front of the lines (Chu et al., "Conditional Positional Encodings for
Vision Transformers" (2021), section 3.2), so that crops and whole volumes share one model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xdist import ops
from xdist.cost.place import Block, Convolution
from xdist.errors import ConfigError
from xdist.grid_shard import GridShard
from xdist.models.segmenter import Layer, Normed, Segmenter, SegmenterConfig, SiLUMLP
from xdist.nn.factorised import FactorisedAttention


@dataclass(frozen=True)
class AxialConfig(SegmenterConfig):
    """The segmenter's sizes. kernel: taps of the convolution along every dim."""

    head_dim: int = 16
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("kernel")
        if self.kernel % 2 == 0:
            raise ConfigError(
                "axial cannot be built of these options",
                f"kernel = {self.kernel} has no middle tap",
                "take an odd one",
            )


class AxialLine(nn.Module):
    """y = mixer(x, gshard), `[B, t1..tk, C]` -> `[B, t1..tk, C]`: attention along one whole dim."""

    def __init__(self, config: AxialConfig, along: int) -> None:
        super().__init__()
        self.attention = FactorisedAttention(
            config.dim, (along,), head_dim=config.head_dim, layers=config.depth
        )

    def forward(self, x: Tensor, gshard: GridShard) -> Tensor:
        return self.attention(x, gshard)


class Position(nn.Module):
    """y = conv(x), depthwise over every dim. Moves: its halo, in the dtype of the stream."""

    def __init__(self, config: AxialConfig) -> None:
        super().__init__()
        kernel = (config.kernel,) * len(config.sizes)
        self.conv = nn.Parameter(torch.randn(config.dim, 1, *kernel) * 0.1)
        self.conv_bias = nn.Parameter(torch.zeros(config.dim))
        self.dtype = config.stream_dtype

    def forward(self, x: Tensor, gshard: GridShard) -> Tensor:
        return ops.conv_nd(x.to(self.dtype), self.conv, self.conv_bias, gshard, groups=x.shape[-1])


class Axial(Segmenter):
    """The segmenter whose layers attend along lines.

    Raises:
        ConfigError: sizes or options that cannot be built.
    """

    def __init__(self, config: AxialConfig) -> None:
        dims = range(len(config.sizes))
        layers = []
        for i in range(config.depth):
            layers.append(_layer(config, Position(config), f"position {i}",
                                    reach=(Convolution(config.kernel),)))  # fmt: skip
            for d in reversed(dims):
                name = f"attention {i} along dim {d}"
                layers.append(_layer(config, AxialLine(config, d), name, whole=(d,)))
            layers.append(_layer(config, SiLUMLP(config.dim, config.hidden), f"mlp {i}"))
        super().__init__(config, layers)


def _layer(
    config: AxialConfig,
    inner: nn.Module,
    name: str,
    *,
    whole: tuple[int, ...] = (),
    reach: tuple[Convolution, ...] = (),
) -> Layer:
    block = Block(name, config.dim, whole=whole, reach=reach, itemsize=config.stream_dtype.itemsize)
    tokenwise = isinstance(inner, SiLUMLP)
    return Layer(Normed(inner, config.dim), block, tokenwise=tokenwise, recompute=config.recompute)


def build(config: AxialConfig, *, seed: int | None = None) -> Axial:
    """The model of these sizes; seed: as in `xdist.models.build`."""
    if seed is None:
        return Axial(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Axial(config)
