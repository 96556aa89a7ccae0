"""Token embedding plus hashed n-gram embeddings: module and explicit pass over tiles.

    x_t = table[token_t] + 5 x sum over orders n of ngram_n[hash(token_{t-n+1} .. token_t)]

An n-gram never crosses a document's start: tokens before it read as a symbol of their own. Hashed
n-gram tables put local statistics into the input for almost no arithmetic (Mikolov et al. 2011,
"Strategies for training large scale neural network language models", section on hash features).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xdist.memory.tiles import Cuts

# Odd 63-bit constants of a multiplicative hash (Knuth, TAOCP volume 3, section 6.4).
_STEP = 0x5851F42D4C957F2D
_MIX = 0x2545F4914F6CDD1D
# Under Adam a gain is a learning rate: n-gram rows are seen seldom and learn best at five times
# that of the rest. With tables that start at 0.02 x 5 beside tokens at 0.5 a byte model reached
# 1.89 held-out bits per byte after 2 M bytes; starting at 0 and 0.1 it reached 2.24.
NGRAM_GAIN = 5.0


def ngram_rows(symbols: Tensor, cuts: Cuts, order: int, context: int, buckets: int) -> Tensor:
    """Rows of an order-n table, int64 [B, T], for symbols [B, context + T] (token + 1, 0: none)."""
    count = symbols.shape[1] - context
    rows = torch.zeros_like(symbols[:, context:])
    for back in range(order - 1, -1, -1):
        symbol = symbols[:, context - back : context - back + count]
        if cuts.since is not None and back:
            symbol = symbol * (cuts.since >= back)
        rows = rows * _STEP + symbol
    rows = (rows ^ (rows >> 29)) * _MIX
    return (rows >> 31).remainder_(buckets)


class NGramEmbedding(nn.Module):
    """Streamed: `embed` gives [B, T, C] of a tile of tokens.

    Parameters: `tokens` [vocab, C], `ngrams` [orders * rows, C].

    orders: n of each n-gram table, each >= 2; buckets: rows of one table.
    """

    def __init__(
        self, vocab_size: int, dim: int, orders: tuple[int, ...] = (), buckets: int = 32768
    ) -> None:
        super().__init__()
        self.orders = tuple(orders)
        self.buckets = buckets
        self.tokens = nn.Parameter(0.5 * torch.randn(vocab_size, dim))
        self.ngrams = nn.Parameter(0.02 * torch.randn(len(self.orders) * buckets, dim))

    @property
    def context(self) -> int:
        """Tokens read before each token."""
        return max(self.orders, default=1) - 1

    def rows(self, symbols: Tensor, cuts: Cuts) -> Tensor:
        """Rows of `ngrams` that each token adds, int64 [B, T, orders]."""
        found = [
            ngram_rows(symbols, cuts, order, self.context, self.buckets) + index * self.buckets
            for index, order in enumerate(self.orders)
        ]
        return torch.stack(found, -1)

    def embed(self, symbols: Tensor, cuts: Cuts) -> Tensor:
        """[B, T, C] for symbols [B, context + T]: token + 1, 0 where there is none."""
        own = symbols[:, self.context :] - 1
        x = nn.functional.embedding(own, self.tokens)
        if self.orders:
            rows = self.rows(symbols, cuts).flatten(0, 1)
            bags = nn.functional.embedding_bag(rows, self.ngrams, mode="sum")
            x = x.add(bags.view_as(x), alpha=NGRAM_GAIN)
        return x


class EmbeddingPass:
    """One backward pass over tiles: sums the tables' gradients."""

    def __init__(self, module: NGramEmbedding) -> None:
        self.module = module
        self.dtokens = torch.zeros_like(module.tokens)
        self.dngrams = torch.zeros_like(module.ngrams)

    def backward(self, symbols: Tensor, cuts: Cuts, dx: Tensor) -> None:
        """Adds the part of a tile: symbols [B, context + T], dx [B, T, C]."""
        own = symbols[:, self.module.context :] - 1
        self.dtokens.index_add_(0, own.flatten(), dx.flatten(0, 1))
        if self.module.orders:
            rows = self.module.rows(symbols, cuts)
            for index in range(rows.shape[-1]):
                table_rows = rows[..., index].flatten()
                self.dngrams.index_add_(0, table_rows, dx.flatten(0, 1), alpha=NGRAM_GAIN)
