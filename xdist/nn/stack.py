"""Embedding and blocks streamed over tiles, each as one autograd function: tokens -> hidden states.

Kept for backward: the input of every block but the first ([B, n, C] each; the embedding is
computed again), halos and states. A block's input is freed as soon as its backward is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from xdist.comm.first_order import first_order
from xdist.memory.stream import Kept, Sweep
from xdist.nn.embedding import EmbeddingPass, NGramEmbedding
from xdist_kernels.autocast import in_given_dtypes

if TYPE_CHECKING:
    from xdist.nn.block import Block


class Stack(Protocol):
    """What is streamed: an embedding, blocks, and the dtype of their matrix products."""

    embedding: NGramEmbedding
    product_dtype: torch.dtype

    @property
    def blocks(self) -> list[Block]: ...


@dataclass(frozen=True)
class Streaming:
    """How a block runs over tiles: `block(x, streaming=...)`.

    dtype: of the matrix products. owned: nobody else reads the gradient of the output, so backward
    may work in place in it. again: makes the block's input once more, which is then not kept.
    """

    sweep: Sweep
    dtype: torch.dtype
    owned: bool = True
    again: Callable[[], Tensor] | None = None


def stream(stack: Stack, sweep: Sweep, tokens: Tensor, *, owned: bool = False) -> Tensor:
    """Hidden states [B, n, C] of tokens int64 [B, n].

    owned: the caller promises that nobody else reads the gradient of what is returned.
    """
    symbols = _Symbols(stack.embedding, sweep, tokens + 1)
    table = stack.embedding
    x: Tensor = StreamedEmbedding.apply(symbols, table.tokens, table.ngrams)
    last = len(stack.blocks) - 1
    for index, block in enumerate(stack.blocks):
        again = symbols.embed if index == 0 else None
        x = block(x, streaming=Streaming(sweep, stack.product_dtype, owned or index < last, again))
    return x


class _Symbols:
    """The symbols (token + 1) of a batch with those before each tile."""

    def __init__(self, embedding: NGramEmbedding, sweep: Sweep, symbols: Tensor) -> None:
        self.embedding, self.sweep, self.symbols = embedding, sweep, symbols
        self.halo = sweep.exchange.halo(symbols, embedding.context)

    def embed(self) -> Tensor:
        """Their embedding, [B, n, C]."""
        like = self.embedding.tokens
        x = torch.empty(*self.symbols.shape, like.shape[1], dtype=like.dtype, device=like.device)
        for tiles in self.sweep.segments:
            for tile in tiles:
                read = self.sweep.read(self.embedding, self.symbols, self.halo, tile)
                x[:, tile.start : tile.stop] = self.embedding.embed(*read)
        return x


class StreamedEmbedding(torch.autograd.Function):
    """x = StreamedEmbedding.apply(symbols, tokens table, n-gram table)."""

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, symbols: _Symbols, *tables: Tensor) -> Tensor:
        ctx.symbols = symbols
        return symbols.embed()

    @staticmethod
    @first_order
    def backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
        held: _Symbols = ctx.symbols
        tables = EmbeddingPass(held.embedding)
        for tiles in held.sweep.segments:
            for tile in tiles:
                symbols, cuts = held.sweep.read(held.embedding, held.symbols, held.halo, tile)
                tables.backward(symbols, cuts, dx[:, tile.start : tile.stop])
        return None, tables.dtokens, tables.dngrams


class StreamedBlock(torch.autograd.Function):
    """y = StreamedBlock.apply(block, streaming, x, *block.stream_parameters()), [B, n, C].

    The parameters are read from the block both times, so that whatever gathers them before a
    backward pass may have let them go in between.
    """

    @staticmethod
    @in_given_dtypes
    def forward(
        ctx: Any, block: Block, streaming: Streaming, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        layer: Any = block.begin(streaming.dtype)
        sweep = streaming.sweep
        run = sweep.recurrent_forward if block.recurrent else sweep.windowed_forward
        out, rest = run(layer, x)
        ctx.block, ctx.streaming = block, streaming
        ctx.kept = (None if streaming.again else x.detach(), rest)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        block: Block = ctx.block
        streaming: Streaming = ctx.streaming
        kept: tuple[Tensor | None, Kept] | None = ctx.kept
        if kept is None:
            raise RuntimeError("backward was called twice: a streamed model keeps nothing for it")
        ctx.kept = None
        x, rest = kept
        del kept
        if x is None:
            assert streaming.again is not None
            x = streaming.again()
        dx = grad if streaming.owned and grad.is_contiguous() else grad.clone()
        layer: Any = block.begin(streaming.dtype)
        sweep = streaming.sweep
        back = sweep.recurrent_backward if block.recurrent else sweep.windowed_backward
        back(layer, x, rest, dx)
        return None, None, dx, *layer.gradients()
