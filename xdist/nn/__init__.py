"""Layers: mixers by name, MLP, norm, embedding, and the block that joins them.

`build_mixer(name, dim, **options)` gives a module called as `y = mixer(x, shard)`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from xdist.errors import ConfigError
from xdist.nn.attention import Attention
from xdist.nn.block import Block
from xdist.nn.embedding import NGramEmbedding
from xdist.nn.linear import GatedLinearAttention
from xdist.nn.mlp import SquaredReLUMLP
from xdist.nn.norm import RMSNorm

__all__ = [
    "Attention",
    "Block",
    "GatedLinearAttention",
    "NGramEmbedding",
    "RMSNorm",
    "SquaredReLUMLP",
    "build_mixer",
]

MIXERS: dict[str, type[nn.Module]] = {"attention": Attention, "linear": GatedLinearAttention}


def build_mixer(name: str, dim: int, **options: Any) -> nn.Module:
    """The mixer `name` for width `dim`; options as in its class.

    Raises:
        ConfigError: unknown name, an option the mixer does not have, or head_dim not dividing dim.
    """
    if name not in MIXERS:
        raise ConfigError(
            f"there is no mixer {name!r}", f"the mixers are {', '.join(sorted(MIXERS))}"
        )
    head_dim = options.get("head_dim", 32)
    if head_dim < 1 or dim % head_dim:
        raise ConfigError(
            f"mixer {name!r}: heads do not fill the width",
            f"dim {dim} = {dim // max(head_dim, 1)} x head_dim {head_dim} + "
            f"{dim % max(head_dim, 1)}",
            "choose a head_dim that divides dim",
        )
    try:
        return MIXERS[name](dim, **options)
    except TypeError as error:
        raise ConfigError(f"mixer {name!r} was not built", str(error)) from error
