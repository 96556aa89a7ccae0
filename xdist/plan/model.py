"""What the plan asks of a model, whichever kind the config names."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from xdist.config import Config
from xdist.cost.model import Activations, Streamed
from xdist.cost.model import activation_bytes as streamed_activations
from xdist.cost.model import pass_bytes as streamed_moves
from xdist.layout import Layout
from xdist.models import (
    MixerConfig,
    TokenSizes,
    TransformersConfig,
    build,
    hybrid_lm,
    sizes_of,
)
from xdist.plan import decoders, mixers
from xdist.plan.result import Moves


def sizes(config: Config) -> Any:
    """The sizes of the config's model, with the strategies of its layers."""
    return sizes_of(config.model, config.parallel)


@lru_cache(maxsize=8)
def meta_model(model: TokenSizes) -> Any:
    """The model without values: on the meta device nothing is allocated."""
    with torch.device("meta"):
        return build(model)


def pass_moves(
    model: TokenSizes, layout: Layout, cu_seqlens: tuple[int, ...], rank: int, rows: int,
    ulysses: int = 1,
) -> Moves:  # fmt: skip
    """Bytes of forward and backward of one call of the model, by move, without the loss; ulysses:
    the inner degree of the mesh."""
    if isinstance(model, MixerConfig):
        return mixers.pass_moves(model, layout, cu_seqlens, rank, rows, ulysses)
    if isinstance(model, TransformersConfig):
        return decoders.pass_moves(model, layout, cu_seqlens, rank, rows, ulysses)
    return streamed_moves(Streamed.of(model), layout, cu_seqlens, rank, rows)


def element_bytes(model: TokenSizes) -> int:
    """Bytes of an element of the parameters."""
    return 8 if model.dtype == "float64" else 4


def flops_per_token(model: TokenSizes, length: int) -> int:
    """Floating-point operations of a token forward in a sequence of `length` tokens."""
    if isinstance(model, MixerConfig):
        return mixers.flops_per_token(model, length)
    if isinstance(model, TransformersConfig):
        return decoders.flops_per_token(model, length)
    return hybrid_lm.flops_per_token(model)


def passes(model: TokenSizes) -> int:
    """How often a token's forward operations are made in a step: backward twice, recompute once."""
    whole = isinstance(model, MixerConfig | TransformersConfig) and not model.recompute
    return 3 if whole else 4


def activations(
    model: TokenSizes, layout: Layout, rank: int, *, rows: int, tile_tokens: int, segments: int,
    ulysses: int = 1,
) -> Activations:  # fmt: skip
    """Activations at the peak of a micro-step of `rows` sequences, on one sequence rank; segments:
    of a whole sequence; ulysses: the inner degree of the mesh."""
    tokens = layout.local_length(rank)
    if isinstance(model, MixerConfig):
        received = mixers.forward_received(model, layout, rank, rows, ulysses)
        return mixers.activation_bytes(
            model, tokens=tokens, rows=rows, tile_tokens=tile_tokens, received=received
        )
    if isinstance(model, TransformersConfig):
        received = decoders.forward_received(model, layout, rank, rows, ulysses)
        return decoders.activation_bytes(
            model, tokens=tokens, rows=rows, tile_tokens=tile_tokens, received=received
        )
    streamed = Streamed.of(model)
    return streamed_activations(
        streamed,
        tokens=tokens,
        rows=rows,
        tile_tokens=tile_tokens,
        crosses=segments > 1 and "linear" in streamed.kinds,
    )
