"""A language model whose layers are any registered mixers, and MLPs as layers of their own.

    x = table[token];   each layer: x = x + f(norm(x));   logits = norm(x) head^T

A pattern such as "(gated_deltanet,mlp)*3,attention,mlp" names f of each layer, bottom to top. Kept
for backward is the input of each layer and what its exchanges received (memory/checkpoint.py); an
MLP and the loss work on tiles of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist.config_pattern import parse_pattern
from xdist.errors import ConfigError
from xdist.memory.checkpoint import checkpoint
from xdist.memory.loss import TiledCrossEntropy, count_valid, sum_of_ranks
from xdist.memory.tiled import tiled
from xdist.nn import MIXERS, RMSNorm, SquaredReLUMLP, build_mixer

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Matrices that are no map from channels to channels: Muon leaves them alone.
SMALL = ("conv", "decay", "beta", "route", "query")
# Nor do these decay, as published: they are rates and biases, one a channel and state.
RATES = ("A_log", "gate_bias")


@dataclass(frozen=True)
class MixerConfig:
    """The model's sizes: the keys of the section [model] of a config that this model reads.

    head_dim, conv_width and window go to every mixer that has such an option; options replace them
    for one mixer and add others: `{"gla": {"expand_k": 1.0}}`. attention, recurrent: strategies of
    those layers.
    """

    vocab_size: int = 256
    dim: int = 64
    pattern: str = "(gla,mlp)*3,attention,mlp"
    head_dim: int = 32
    mlp_ratio: float = 2.0
    conv_width: int = 4
    window: int | None = None
    # A mapping has no hash; sizes that differ in it alone are still not equal.
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    recompute: bool = True
    dtype: str = "float32"
    attention: str = "auto"
    recurrent: str = "auto"

    @classmethod
    def of(cls, section: Any, parallel: Any = None) -> MixerConfig:
        """From the config's sections [model] and [parallel]."""
        own = [one.name for one in fields(cls) if one.name not in ("attention", "recurrent")]
        strategies = {} if parallel is None else {
            "attention": parallel.attention, "recurrent": parallel.recurrent
        }  # fmt: skip
        return cls(**{name: getattr(section, name) for name in own}, **strategies)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, bottom to top."""
        return parse_pattern(self.pattern, "mixer_lm")

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return round(self.mlp_ratio * self.dim)

    def mixer(self, kind: str) -> nn.Module:
        """The mixer of one layer.

        Raises:
            ConfigError: an option that the mixer does not have, or sizes that do not fit it.
        """
        common = {
            "head_dim": self.head_dim,
            "conv_width": self.conv_width,
            "window": self.window,
            "strategy": self.attention if kind == "attention" else self.recurrent,
        }
        known = inspect.signature(MIXERS[kind]).parameters
        options = {key: value for key, value in common.items() if key in known}
        if "strategy" not in known and common["strategy"] != "auto":
            raise ConfigError(
                f"mixer {kind!r} has one strategy",
                f'parallel.recurrent = "{common["strategy"]}" cannot be honoured',
                "set parallel.recurrent=auto",
            )
        return build_mixer(kind, self.dim, **{**options, **self.options.get(kind, {})})


class Normed(nn.Module):
    """f(norm(x)), [B, n, C] -> [B, n, C]."""

    def __init__(self, inner: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.inner = inner

    def forward(self, x: Tensor, *shard: Any) -> Tensor:
        y: Tensor = self.inner(self.norm(x), *shard)
        return y


class MixerLayer(nn.Module):
    """x + f(norm(x)); its parameters are read only while it is called, forward and backward."""

    def __init__(self, inner: nn.Module, config: MixerConfig) -> None:
        super().__init__()
        self.body = Normed(inner, config.dim)
        self.tokenwise = isinstance(inner, SquaredReLUMLP)
        self.recompute = config.recompute

    def forward(self, x: Tensor, shard: Any = None, *, tile_tokens: int = 4096) -> Tensor:
        again = self.recompute and torch.is_grad_enabled()
        if self.tokenwise:
            return x + (tiled(self.body, x, tile_tokens=tile_tokens) if again else self.body(x))
        return x + (checkpoint(self.body, x, shard) if again else self.body(x, shard))


class MixerLM(nn.Module):
    """`model(tokens, shard) -> logits`, `model.loss(tokens, labels, shard) -> scalar`.

    tokens int64 [B, n]: this rank's part under `shard` (None: the whole sequence on one rank).
    tile_tokens: tokens of an MLP's tile over all rows of the batch.

    Raises:
        ConfigError: a pattern, an option or sizes that cannot be built.
    """

    def __init__(self, config: MixerConfig, *, tile_tokens: int = 4096) -> None:
        super().__init__()
        self.config = config
        self.tile_tokens = tile_tokens
        self.embedding = nn.Parameter(0.5 * torch.randn(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(MixerLayer(_inner(k, config), config) for k in config.kinds)
        self.norm = RMSNorm(config.dim)
        self.head = nn.Parameter(0.02 * torch.randn(config.vocab_size, config.dim))
        self.to(DTYPES[config.dtype])

    @property
    def blocks(self) -> list[MixerLayer]:
        """The layers, bottom to top: what an engine may gather one by one."""
        return list(self.layers)  # type: ignore[arg-type]

    def hidden(self, tokens: Tensor, shard: Any = None) -> Tensor:
        """Hidden states before the last norm, [B, n, C]."""
        x = F.embedding(tokens, self.embedding)
        per_row = max(self.tile_tokens // max(tokens.shape[0], 1), 1)
        for layer in self.layers:
            x = layer(x, shard, tile_tokens=per_row)
        return x

    def forward(self, tokens: Tensor, shard: Any = None) -> Tensor:
        """Logits [B, n, vocab] in the dtype of the parameters."""
        return F.linear(self.norm(self.hidden(tokens, shard)), self.head)

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
            self.hidden(tokens, shard), self.head, self.norm.weight, labels,
            ignore_index, valid, sum_of_ranks(shard), self.head.dtype, False,
        )  # fmt: skip

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: "hidden" matrix, "table" (which does not decay),
        or "other"."""
        return {name: _role(name, p) for name, p in self.named_parameters()}

    def parameter_count(self) -> int:
        """Parameters, tables included."""
        return sum(parameter.numel() for parameter in self.parameters())


def build(config: MixerConfig, *, tile_tokens: int = 4096, seed: int | None = None) -> MixerLM:
    """The model of these sizes; seed: as in `xdist.models.build`."""
    if seed is None:
        return MixerLM(config, tile_tokens=tile_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixerLM(config, tile_tokens=tile_tokens)


def _inner(kind: str, config: MixerConfig) -> nn.Module:
    return SquaredReLUMLP(config.dim, config.hidden) if kind == "mlp" else config.mixer(kind)


def _role(name: str, parameter: Tensor) -> str:
    last = name.rpartition(".")[2]
    if name == "embedding" or last in RATES:
        return "table"
    matrix = name.startswith("layers.") and parameter.ndim == 2 and last not in SMALL
    return "hidden" if matrix else "other"
