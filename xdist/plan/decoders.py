"""What a model of transformers moves, keeps and computes: from the calls that its layers make.

The whole model is built on the meta device and called there once, on one token, with its calls of
attention noted (xdist.parallel.noted); the formulas of `xdist.cost` say what such a call moves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from xdist.cost.model import LOSS_COPIES, LOSS_TILE_TOKENS, TOKEN_BYTES, Activations
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.models.transformers_lm import TransformersConfig, TransformersLM
from xdist.parallel.noted import Noted, noting
from xdist.plan import mixers
from xdist.plan.result import Moves


@dataclass(frozen=True)
class Decoder:
    """What the plan knows of the model. One row of one token was noted."""

    calls: tuple[tuple[Noted, int], ...]  # each different call, and in how many layers
    layers: int
    dim: int
    flops: int  # of a token's matrix products, forward, without scores
    width: int  # channels that the widest layer makes of a token


@lru_cache(maxsize=8)
def decoder_of(config: TransformersConfig) -> Decoder:
    """Builds the model once, without values."""
    with torch.device("meta"):
        model = TransformersLM(config).eval()
    with torch.no_grad(), noting() as noted:
        model.hidden(torch.empty(1, 1, dtype=torch.int64, device="meta"))
    blocks, made = model.blocks, model.decoder.config
    active = _active_share(made)
    products = sum(_elements(block, active) for block in blocks) + model.head.numel()
    return Decoder(
        tuple(Counter(noted).items()),
        len(blocks),
        int(made.hidden_size),
        round(2 * products),
        round(max(_made(block, active) for block in blocks)),
    )


def pass_moves(
    config: TransformersConfig, layout: Layout, cu_seqlens: tuple[int, ...], rank: int, rows: int,
    ulysses: int = 1,
) -> Moves:  # fmt: skip
    """Bytes of forward and backward of one call of the model, by move, without the loss; ulysses:
    the inner degree of the mesh."""
    documents = Documents.of(cu_seqlens, layout.length)
    found: list[Moves] = []
    for call, times in decoder_of(config).calls:
        found += [mixers.call_moves(call, layout, documents, rank, rows, ulysses)] * times
    return mixers.summed(found)


def flops_per_token(config: TransformersConfig, length: int) -> int:
    """Floating-point operations of a token forward: matrix products (of experts those that a token
    visits) and scores; a query without a window sees half the sequence of `length` tokens."""
    known = decoder_of(config)
    scores = sum(
        times * mixers.mixing_flops(problem, length)
        for call, times in known.calls
        for problem in call.problems
    )
    return known.flops + scores


def forward_received(
    config: TransformersConfig, layout: Layout, rank: int, rows: int, ulysses: int = 1
) -> int:
    """Bytes that arrive on a rank in the forward pass of one call, in one document."""
    documents = Documents.of(None, layout.length)
    return sum(
        times * mixers.call_received(call, layout, documents, rank, rows, ulysses)
        for call, times in decoder_of(config).calls
    )


def activation_bytes(
    config: TransformersConfig, *, tokens: int, rows: int, tile_tokens: int, received: int
) -> Activations:
    """Activations of forward and backward on a rank that holds `tokens` tokens a row; received:
    bytes that arrive in forward and are kept. tile_tokens is not read: its layers have no tiles.

    An estimate, as of the mixers: copies of what the widest layer's projections make.
    """
    known = decoder_of(config)
    element = 8 if config.dtype == "float64" else 4
    own = rows * tokens
    stream = own * known.dim * element
    working = mixers.MIXER_COPIES * own * known.width * element
    loss = LOSS_COPIES * min(LOSS_TILE_TOKENS, tokens) * config.vocab_size * element
    integers = 3 * own * TOKEN_BYTES
    if config.recompute:
        kept = known.layers * stream + received
        return Activations(kept + integers, 2 * stream + max(working, loss), max(working, loss))
    # Of what a layer makes, about half is saved for backward.
    kept = known.layers * (working // 2 + 2 * stream) + received
    return Activations(kept + integers, 2 * stream + max(working // 2, loss), loss)


def _active_share(made: object) -> float:
    """Of the experts' matrices, the share that a token visits."""
    experts = getattr(made, "num_local_experts", None) or getattr(made, "num_experts", None)
    visited = getattr(made, "num_experts_per_tok", None)
    return visited / experts if experts and visited else 1.0


def _elements(block: nn.Module, active: float) -> float:
    """Elements of a layer's matrices; those of experts, which are stacked, by their share."""
    return sum(p.numel() * (active if p.ndim == 3 else 1) for p in block.parameters() if p.ndim > 1)


def _made(block: nn.Module, active: float) -> float:
    """Channels that a layer's matrices make of a token."""
    return sum(
        p.shape[0] * p.shape[1] * active if p.ndim == 3 else p.shape[0]
        for p in block.parameters()
        if p.ndim > 1
    )
