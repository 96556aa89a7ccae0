"""A byte (or token) language model of linear-attention and window-attention blocks.

    x = embedding(tokens) + hashed n-gram embeddings;  blocks by a pattern such as
    "linear*3,attention*1";  logits = norm(x) head^T

The blocks are streamed over tiles of a rank's tokens (nn/stack.py): memory per token is the input
of each block, whatever the sequence length, and each block makes two small exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from xdist.config_pattern import parse_pattern
from xdist.errors import ConfigError
from xdist.memory.exchange import exchange_of
from xdist.memory.loss import TiledCrossEntropy, count_valid, sum_of_ranks
from xdist.memory.stream import Sweep
from xdist.memory.tiles import tiles_of
from xdist.nn import Block, NGramEmbedding, RMSNorm, build_mixer
from xdist.nn.stack import stream

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class HybridConfig:
    """The model's sizes: the keys of the section [model] of a config, without `kind`."""

    vocab_size: int = 256
    dim: int = 96
    pattern: str = "linear*3,attention*1"
    head_dim: int = 32
    mlp_ratio: float = 2.0
    conv_width: int = 4
    window: int | None = 128
    ngram_orders: tuple[int, ...] = ()
    ngram_buckets: int = 32768
    dtype: str = "float32"

    @classmethod
    def of(cls, section: Any) -> HybridConfig:
        """From anything with these attributes (the config's section [model])."""
        return cls(**{field.name: getattr(section, field.name) for field in fields(cls)})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each block, bottom to top."""
        return tuple(parse_pattern(self.pattern))

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return round(self.mlp_ratio * self.dim)


class HybridLM(nn.Module):
    """`model(tokens, shard) -> logits`, `model.loss(tokens, labels, shard) -> scalar`.

    tokens int64 [B, n]: this rank's part under `shard` (None: the whole sequence on one rank).
    precision: dtype of the matrix products of the blocks and the head ("bfloat16" leaves
    parameters, residual stream, decays, states and loss in float32); tile_tokens: tokens of a tile
    over all rows of the batch.

    Raises:
        ConfigError: a pattern, size or precision that cannot be built or streamed.
    """

    def __init__(
        self, config: HybridConfig, *, precision: str | None = None, tile_tokens: int = 1024
    ) -> None:
        super().__init__()
        self.config = config
        self.tile_tokens = tile_tokens
        self.product_dtype = _product_dtype(config.dtype, precision)
        self.embedding = NGramEmbedding(
            config.vocab_size, config.dim, config.ngram_orders, config.ngram_buckets
        )
        self.layers = nn.ModuleList(_block(kind, config) for kind in config.kinds)
        self.norm = RMSNorm(config.dim)
        self.head = nn.Parameter(0.02 * torch.randn(config.vocab_size, config.dim))
        self.to(PRECISIONS[config.dtype])
        for block in self.blocks:
            block.stream_parameters()

    @property
    def blocks(self) -> list[Block]:
        """The blocks, bottom to top."""
        return list(self.layers)  # type: ignore[arg-type]

    def hidden(self, tokens: Tensor, shard: Any = None, *, owned: bool = False) -> Tensor:
        """Hidden states before the last norm, [B, n, C]; owned: as in `stream`."""
        exchange = exchange_of(shard, tokens)
        reach = max(self.config.conv_width - 1, self.embedding.context, 1)
        per_tile = max(self.tile_tokens // max(tokens.shape[0], 1), reach)
        sweep = Sweep(exchange, tiles_of(exchange.segments, per_tile))
        return stream(self, sweep, tokens, owned=owned)

    def forward(self, tokens: Tensor, shard: Any = None) -> Tensor:
        """Logits [B, n, vocab] in the dtype of the parameters."""
        hidden = self.norm(self.hidden(tokens, shard)).to(self.product_dtype)
        return (hidden @ self.head.to(self.product_dtype).t()).to(self.head.dtype)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        shard: Any = None,
        valid_tokens: int | None = None,
        *,
        ignore_index: int = -100,
    ) -> Tensor:
        """Mean cross entropy over all valid labels of the global batch (as xdist.cross_entropy).

        labels int64 [B, n]: already shifted; valid_tokens: their number in the whole global batch
        (None: counted, one exchange of one number).
        """
        valid = count_valid(labels, shard, ignore_index) if valid_tokens is None else valid_tokens
        return TiledCrossEntropy.apply(
            self.hidden(tokens, shard, owned=True), self.head, self.norm.weight, labels,
            ignore_index, valid, sum_of_ranks(shard), self.product_dtype, True,
        )  # fmt: skip

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: "hidden" matrix, "table", or "other"."""
        small = ("conv", "decay")
        return {
            name: "table"
            if name.startswith("embedding.ngrams")
            else "hidden"
            if name.startswith("layers.") and p.ndim == 2 and name.split(".")[-1] not in small
            else "other"
            for name, p in self.named_parameters()
        }

    def parameter_count(self) -> int:
        """Parameters, tables included."""
        return sum(parameter.numel() for parameter in self.parameters())


def flops_per_token(config: HybridConfig) -> int:
    """Floating-point operations of a token forward (backward costs twice, recompute once more).

    Matrix products only: a product [I] -> [O] is 2 I O; linear attention in chunks of 32; the
    embedding is a lookup.
    """
    c, hidden = config.dim, config.hidden
    mlp = 4 * c * hidden
    chunk = 32
    linear = 2 * c * 4 * c + 2 * c * c + 2 * c * (c // config.head_dim)
    linear += 2 * c * (2 * chunk) + 4 * c * config.head_dim
    seen = (config.window or 0) + 64
    attention = 8 * c * c + 4 * c * seen
    each = {"linear": linear, "attention": attention}
    return sum(each[kind] + mlp for kind in config.kinds) + 2 * c * config.vocab_size


def build(
    config: Any, *, precision: str | None = None, tile_tokens: int = 1024, seed: int | None = None
) -> HybridLM:
    """The model of a config's section [model] (or a HybridConfig).

    seed: of the initial values (None: torch's generator as it stands); the same on every rank.
    """
    sizes = config if isinstance(config, HybridConfig) else HybridConfig.of(config)
    if seed is None:
        return HybridLM(sizes, precision=precision, tile_tokens=tile_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HybridLM(sizes, precision=precision, tile_tokens=tile_tokens)


def _product_dtype(dtype: str, precision: str | None) -> torch.dtype:
    chosen = dtype if precision is None else precision
    if chosen not in PRECISIONS or (dtype == "float64") != (chosen == "float64"):
        raise ConfigError(
            f"precision {chosen!r} does not fit parameters in {dtype}",
            "float32 parameters take float32 or bfloat16 products, float64 parameters float64",
        )
    return PRECISIONS[chosen]


def _block(kind: str, config: HybridConfig) -> Block:
    options: dict[str, Any] = {"head_dim": config.head_dim}
    options |= {"window": config.window} if kind == "attention" else {}
    options |= {"conv_width": config.conv_width} if kind == "linear" else {}
    # A pattern's "linear" is the layer that streams; the registry's is the published one.
    name = "gated_linear" if kind == "linear" else kind
    return Block(build_mixer(name, config.dim, **options), config.dim, config.hidden)
