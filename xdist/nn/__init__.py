"""Layers: mixers by name, MLP, norm, embedding, and the block that joins them.

`build_mixer(name, dim, **options)` gives a module called as `y = mixer(x, shard)`.
"""

from __future__ import annotations

from xdist.nn.attention import Attention
from xdist.nn.block import Block
from xdist.nn.embedding import NGramEmbedding
from xdist.nn.factorised import FactorisedAttention
from xdist.nn.grid_attention import (
    AxialAttention,
    GridAttention,
    NeighborhoodAttention,
    WindowAttention,
)
from xdist.nn.grid_mixer import GridMixer
from xdist.nn.grid_scan import GridScan, cross_orders, turning_order
from xdist.nn.linear import GatedLinearAttention
from xdist.nn.mlp import SquaredReLUMLP
from xdist.nn.norm import RMSNorm
from xdist.nn.patches import PatchEmbed, PatchMerge, patches, unpatches
from xdist.nn.registry import ALIASES, MIXERS, build_mixer

__all__ = [
    "ALIASES",
    "MIXERS",
    "Attention",
    "AxialAttention",
    "Block",
    "FactorisedAttention",
    "GatedLinearAttention",
    "GridAttention",
    "GridMixer",
    "GridScan",
    "NGramEmbedding",
    "NeighborhoodAttention",
    "PatchEmbed",
    "PatchMerge",
    "RMSNorm",
    "SquaredReLUMLP",
    "WindowAttention",
    "build_mixer",
    "cross_orders",
    "patches",
    "turning_order",
    "unpatches",
]
