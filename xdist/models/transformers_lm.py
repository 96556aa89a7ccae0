"""A decoder of HuggingFace Transformers as a model of `xdist train`, made from a config of its own.

    h = decoder(tokens), its layers attending through xdist;  logits = h head^T

The library's code is run as it is (xdist/integrations/transformers.py). Kept for backward is the
input of each layer and what its exchanges received (memory/checkpoint.py); the loss works on tiles
of tokens, so that the logits of a whole share are never made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist.dropout import Dropout
from xdist.errors import ConfigError
from xdist.integrations.transformers import attach, library
from xdist.memory.checkpoint import checkpoint
from xdist.ops import cross_entropy

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# What some of these models do to their logits after the head, and the value that does nothing.
AFTER_HEAD = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


@dataclass(frozen=True)
class TransformersConfig:
    """The keys of the section [model] of a config that this model reads.

    config_class: name of a configuration class of the library; options: its arguments, where the
    word "none" stands for None; attention: strategy of its layers.
    """

    config_class: str
    vocab_size: int = 256
    # A mapping has no hash; sizes that differ in it alone are still not equal.
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    recompute: bool = True
    dtype: str = "float32"
    attention: str = "auto"

    @classmethod
    def of(cls, section: Any, parallel: Any = None) -> TransformersConfig:
        """From the config's sections [model] and [parallel]."""
        return cls(
            section.config_class, section.vocab_size, section.options, section.recompute,
            section.dtype, "auto" if parallel is None else parallel.attention,
        )  # fmt: skip

    def made(self) -> Any:
        """The library's configuration object.

        Raises:
            ConfigError: no such class, an argument that it does not have, or values it refuses.
        """
        kind = getattr(library(), self.config_class, None)
        if not (isinstance(kind, type) and issubclass(kind, library().PreTrainedConfig)):
            raise ConfigError(
                f"transformers {library().__version__} has no configuration class "
                f"{self.config_class!r}",
                "model.config_class names the class of one model's text decoder",
                "such as LlamaConfig, Qwen3Config or Gemma3TextConfig",
            )
        # The library takes any argument and leaves those it does not know without effect.
        known = list(inspect.signature(kind).parameters)
        for name in self.options:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise ConfigError(
                    f"{self.config_class} has no argument {name!r}",
                    f"it has {', '.join(known)}",
                    f"did you mean {near[0]!r}?" if near else "leave it out of model.options",
                )
        given = {name: _given(value) for name, value in self.options.items()}
        try:
            return kind(**given, vocab_size=self.vocab_size, use_cache=False)
        except Exception as error:  # the library raises its own family, TypeError and ValueError
            raise ConfigError(
                f"{self.config_class} refuses model.options", str(error), "mend them"
            ) from error

    @property
    def dim(self) -> int:
        """Channels of the residual stream."""
        return int(self.made().hidden_size)


class TransformersLM(nn.Module):
    """`model(tokens, shard) -> logits`, `model.loss(tokens, labels, shard) -> scalar`.

    tokens int64 [B, n]: this rank's part under `shard` (None: the whole sequence on one rank).
    `decoder` is the library's own module, its parameters under its own names.

    Raises:
        ConfigError: a configuration that cannot be built or attached, or a model whose logits are
            more than one product with its head.
    """

    def __init__(self, config: TransformersConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = _decoder(config)
        self.handle = attach(self.decoder, None, strategy=config.attention)
        if config.recompute:
            for block in self.blocks:
                _recompute(block)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, bottom to top: what an engine may gather one by one."""
        return list(self.decoder.base_model.layers)

    @property
    def head(self) -> Tensor:
        """The output embedding, [vocab, C]."""
        weight: Tensor = self.decoder.get_output_embeddings().weight
        return weight

    def hidden(self, tokens: Tensor, shard: Any = None) -> Tensor:
        """Hidden states after the last norm, [B, n, C]."""
        self.handle.shard = shard
        found: Tensor = self.decoder.base_model(input_ids=tokens).last_hidden_state
        return found

    def forward(self, tokens: Tensor, shard: Any = None) -> Tensor:
        """Logits [B, n, vocab] in the dtype of the parameters."""
        return F.linear(self.hidden(tokens, shard), self.head)

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
        return cross_entropy(
            self.hidden(tokens, shard), self.head, labels, shard,
            ignore_index=ignore_index, valid_tokens=valid_tokens,
        )  # fmt: skip

    def name_dropout(self, *, seed: int, step: int, first_row: int) -> None:
        """What the next call in training drops (config option attention_dropout) is drawn from."""
        rate = getattr(self.decoder.config, "attention_dropout", None)
        self.handle.dropout = Dropout(rate, seed, step, first_row=first_row) if rate else None

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: "hidden" matrix, "table" (which does not decay),
        or "other". A table that is the head too is the head."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        tables.discard(id(self.head))
        inside = {id(p) for block in self.blocks for p in block.parameters() if p.ndim == 2}
        return {
            name: "table" if id(p) in tables else "hidden" if id(p) in inside else "other"
            for name, p in self.named_parameters()
        }

    def parameter_count(self) -> int:
        """Parameters, tables included."""
        return sum(parameter.numel() for parameter in self.parameters())


def build(config: TransformersConfig, *, seed: int | None = None) -> TransformersLM:
    """The model of this configuration; seed: as in `xdist.models.build`."""
    if seed is None:
        return TransformersLM(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransformersLM(config)


def _given(value: Any) -> Any:
    """A value of a settings file as the library takes it."""
    if isinstance(value, Mapping):
        return {name: _given(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_given(item) for item in value]
    return None if value == "none" else value


def _decoder(config: TransformersConfig) -> Any:
    """The library's causal language model, in the parameters' dtype, not attached yet."""
    made = config.made()
    # Without values (plan, dry run) only this way of running experts knows its shapes.
    form = "batched_mm" if torch.get_default_device().type == "meta" else None
    kind = library().AutoModelForCausalLM
    try:
        decoder = kind.from_config(made, **({"experts_implementation": form} if form else {}))
    except Exception as error:  # the library says in many ways what it cannot build
        raise ConfigError(
            f"transformers cannot build a causal language model from {config.config_class}",
            f"{type(error).__name__}: {error}",
            "mend model.options (an id of a token must lie below model.vocab_size; "
            'pad_token_id = "none" for none)',
        ) from error
    decoder = decoder.to(DTYPES[config.dtype])
    _check_head(decoder, config.config_class)
    return decoder.train()


def _check_head(decoder: Any, name: str) -> None:
    """Refuses a model whose logits the loss would not see: they are its head's product alone."""
    found = {
        key: getattr(decoder.config, key)
        for key, nothing in AFTER_HEAD.items()
        if getattr(decoder.config, key, nothing) not in (None, nothing)
    }
    head = decoder.get_output_embeddings()
    if found or head is None or getattr(head, "bias", None) is not None:
        changed = ", ".join(f"{key} = {value}" for key, value in found.items())
        raise ConfigError(
            f"the logits of {name} are more than one product with its head",
            changed or "its head has a bias, or it has no head",
            "the loss is made from hidden states and head alone; set e.g. "
            'options = { final_logit_softcapping = "none" }',
        )
    if head.weight.is_meta:
        return
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.int64)
        decoder.eval()
        hidden = decoder.base_model(input_ids=token).last_hidden_state
        same = torch.allclose(decoder(input_ids=token).logits, F.linear(hidden, head.weight))
    if not same:
        raise ConfigError(
            f"the logits of {name} are more than one product with its head",
            "one token was tried",
            "the loss is made from hidden states and head alone: take another model",
        )


class _Again(nn.Module):
    """A layer with what it is called with beside its input, as `checkpoint` takes a layer."""

    def __init__(self, block: nn.Module, call: Any) -> None:
        super().__init__()
        self.block = block
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.call(x)
        return y


def _recompute(block: nn.Module) -> None:
    """Makes a layer of the library keep its input and what it received, through the library's own
    place for a checkpointing function."""
    if not hasattr(block, "gradient_checkpointing"):
        raise ConfigError(
            f"{type(block).__name__} of transformers cannot be computed again",
            "it has no place for a checkpointing function",
            "set model.recompute=false",
        )

    def again(owner: list[nn.Module], call: Any, x: Tensor) -> Tensor:
        return checkpoint(_Again(owner[0], call), x)

    # In a list: a module inside an attribute would be registered as a part of itself.
    block._gradient_checkpointing_func = functools.partial(again, [block])  # type: ignore[assignment]
    block.gradient_checkpointing = True  # type: ignore[assignment]
