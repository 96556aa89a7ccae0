"""Embedding and blocks streamed over tiles as ONE autograd function: tokens -> hidden states.

Kept for backward: the input of every block but the first ([B, n, C] each; the embedding is
computed again), halos and states. A block's input is freed as soon as its backward is done.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from xdist.memory.stream import Kept, Sweep
from xdist.nn.block import Block
from xdist.nn.embedding import EmbeddingPass, NGramEmbedding


class Stack(Protocol):
    """What is streamed: an embedding, blocks, and the dtype of their matrix products."""

    embedding: NGramEmbedding
    product_dtype: torch.dtype

    @property
    def blocks(self) -> list[Block]: ...


def stack_parameters(stack: Stack) -> list[Tensor]:
    """The parameters `StreamedStack.apply` takes after its first four arguments, in their order."""
    found: list[Tensor] = [stack.embedding.tokens, stack.embedding.ngrams]
    for block in stack.blocks:
        found += block.stream_parameters()
    return found


def _embed(stack: Stack, sweep: Sweep, symbols: Tensor, halo: list[Tensor]) -> Tensor:
    like = stack.embedding.tokens
    x = torch.empty(*symbols.shape, like.shape[1], dtype=like.dtype, device=like.device)
    for tiles in sweep.segments:
        for tile in tiles:
            read = sweep.read(stack.embedding, symbols, halo, tile)
            x[:, tile.start : tile.stop] = stack.embedding.embed(*read)
    return x


class StreamedStack(torch.autograd.Function):
    """hidden = StreamedStack.apply(stack, sweep, tokens, owned, *stack_parameters(stack)).

    tokens int64 [B, n]; hidden [B, n, C]. owned: the caller promises that nobody else reads the
    gradient of hidden, so that backward may work in place in it.
    """

    @staticmethod
    def forward(
        ctx: Any, stack: Stack, sweep: Sweep, tokens: Tensor, owned: bool, *parameters: Tensor
    ) -> Tensor:
        symbols = tokens + 1
        halo = sweep.exchange.halo(symbols, stack.embedding.context)
        x = _embed(stack, sweep, symbols, halo)
        keep = any(ctx.needs_input_grad)
        kept: list[tuple[Tensor | None, Kept]] = []
        for index, block in enumerate(stack.blocks):
            layer: Any = block.begin(stack.product_dtype)
            run = sweep.recurrent_forward if block.recurrent else sweep.windowed_forward
            out, rest = run(layer, x)
            if keep:
                kept.append((x if index else None, rest))
            x = out
        ctx.stack, ctx.sweep, ctx.owned = stack, sweep, owned
        ctx.symbols, ctx.halo, ctx.kept = symbols, halo, kept
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        stack, sweep, kept = ctx.stack, ctx.sweep, ctx.kept
        if kept is None:
            raise RuntimeError("backward was called twice: a streamed model keeps nothing for it")
        ctx.kept = None
        dx = grad if ctx.owned and grad.is_contiguous() else grad.clone()
        gradients: list[Tensor] = []
        for block in reversed(stack.blocks):
            x, rest = kept.pop()
            if x is None:
                x = _embed(stack, sweep, ctx.symbols, ctx.halo)
            layer: Any = block.begin(stack.product_dtype)
            back = sweep.recurrent_backward if block.recurrent else sweep.windowed_backward
            back(layer, x, rest, dx)
            del x
            gradients = [*layer.gradients(), *gradients]
        tables = EmbeddingPass(stack.embedding)
        for tiles in sweep.segments:
            for tile in tiles:
                symbols, cuts = sweep.read(stack.embedding, ctx.symbols, ctx.halo, tile)
                tables.backward(symbols, cuts, dx[:, tile.start : tile.stop])
        return (None, None, None, None, tables.dtokens, tables.dngrams, *gradients)
