"""A decoder of HuggingFace Transformers, unmodified, under a shard."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from xdist.dropout import Dropout
from xdist.errors import ConfigError
from xdist.integrations import transformers_attention as registered
from xdist.integrations.transformers_checks import (
    check_given,
    checked_tokens,
    refuse_arguments,
    refuse_random,
    refuse_settings,
    tokens_of,
)
from xdist.integrations.transformers_rotary import follow_whole_length
from xdist.mesh import Mesh
from xdist.shard import SequenceShard, resolve

NAME = "xdist"
"""What the attention interface is called in the library's registry and an attached config."""

TESTED = frozenset(
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "cohere2",
        "deepseek_v3",
        "granite",
        "llama4_text",
        "ministral3",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen3_moe",
        "smollm3",
    )
)
"""`config.model_type` of the families whose sharded runs are held to equal the unsharded ones."""


class Attached:
    """What `attach` returns: the shard of the next batch, and the way back.

    Attributes:
        shard: where the next batch's tokens lie; set it before each forward whose layout or
            documents differ.
        dropout: names what attention drops in training; set it before each step. `layer` is
            filled in.
        strategy: as in `xdist.attention`.
    """

    def __init__(
        self, model: Any, base: Any, mesh: Mesh | None, strategy: str, dropout: Dropout | None
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.strategy = strategy
        self.dropout = dropout
        self._base = base
        self._shard: SequenceShard | None = None
        self._replaced: list[tuple[nn.Module, str, Any]] = []
        self._hooks: list[Any] = []

    @property
    def shard(self) -> SequenceShard | None:
        """The next batch's shard; None on one device is the whole sequence, one document."""
        return self._shard

    @shard.setter
    def shard(self, shard: SequenceShard | None) -> None:
        if shard is not None and self.mesh is not None and shard.mesh != self.mesh:
            raise ConfigError(
                "the shard belongs to another mesh than the model was attached with",
                f"{shard.mesh} and {self.mesh}",
                "detach, and attach with the new mesh",
            )
        self._shard = shard

    def detach(self) -> None:
        """Gives the model back as it was: its own configuration and attention."""
        for hook in self._hooks:
            hook.remove()
        for module, name, value in self._replaced:
            setattr(module, name, value)
        self._hooks, self._replaced = [], []

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        # A process group cannot be copied: a copy of the model shares its original's handle.
        return self

    def _attach(self) -> None:
        self._give_own_config()
        self._hooks = [
            self.model.register_forward_pre_hook(self._check, with_kwargs=True),
            self._base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._base.register_forward_hook(self._leave, always_call=True),
            *follow_whole_length(self.model),
        ]

    def _give_own_config(self) -> None:
        """Another model may have been made from the same object: this one gets a copy."""
        kind = library().PreTrainedConfig
        held = [
            (module, name, value)
            for module in self.model.modules()
            for name, value in vars(module).items()
            if isinstance(value, kind)
        ]
        configs = {id(value): value for _, _, value in held}
        copies = dict(zip(configs, copy.deepcopy(list(configs.values())), strict=True))
        for own in copies.values():
            own._attn_implementation_internal = NAME
        for module, name, value in held:
            setattr(module, name, copies[id(value)])
        self._replaced = held

    def _check(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            raise ConfigError(
                "an attached model takes its arguments after input_ids by name",
                f"got {len(args)} without a name",
                "pass position_ids=..., inputs_embeds=...",
            )
        refuse_arguments(kwargs)
        refuse_settings(module.config)

    def _enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._check(module, args, kwargs)
        refuse_random(module, module.config)
        values = kwargs | ({"input_ids": args[0]} if args else {})
        shard = self._shard_for(values)
        tokens = checked_tokens(values, shard)
        check_given(values, shard)
        # A mask of ones keeps the library from reading documents out of local positions.
        ones = torch.ones((1, 1), dtype=torch.bool, device=tokens.device)
        kwargs = kwargs | {
            "attention_mask": ones.expand(tokens.shape[:2]),
            "position_ids": shard.document_positions.to(tokens.device)[None],
            # Not in the configuration, which is saved with the model.
            "use_cache": False,
        }
        before = registered.running.get()
        registered.running.set(registered.Forward(shard, self.strategy, self.dropout, self, before))
        return args, kwargs

    def _shard_for(self, values: dict[str, Any]) -> SequenceShard:
        if self._shard is None and self.mesh is not None:
            raise ConfigError(
                "the attached model has no shard for this batch",
                "it was attached with a mesh",
                "set handle.shard = xdist.SequenceShard(mesh, layout, documents)",
            )
        tokens = tokens_of(values)
        return resolve(self._shard, 0 if tokens is None else tokens.shape[1])

    def _leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        forward = registered.running.get()
        if forward is None or forward.owner is not self:
            return
        registered.running.set(forward.before)
        layers = module.config.num_hidden_layers
        if output is not None and forward.calls != layers:
            raise ConfigError(
                "some layers of the model do not attend through the library's interface",
                f"{forward.calls} calls from {layers} layers",
                "a model with other mixers than attention cannot be attached",
            )


def attach(
    model: Any,
    shard: SequenceShard | Mesh | None,
    *,
    strategy: str = "auto",
    dropout: Dropout | None = None,
    untested: bool = False,
) -> Attached:
    """Makes an unmodified decoder of HuggingFace Transformers run under a shard.

    The model is then called with this rank's tokens, `model(input_ids=shard.scatter(tokens))`, and
    answers for the same positions. Rotary positions, documents, sliding windows, soft-caps, sinks
    and shared key heads are those of the model and of the shard. Weights are held whole: the
    gradient of each is this rank's part, which `xdist.reduce_gradients` sums.

    Nothing of the library is replaced: a mask and an attention named "xdist" are registered beside
    its own, and the model gets a copy of its configuration that names them. What moves is that of
    `xdist.attention`, once a layer; nothing else is sent.

    Args:
        model: a decoder (`...Model`) or causal language model (`...ForCausalLM`), trained or new.
        shard: the first batch's shard (the handle's can be set for each batch), a mesh for shards
            to come, or None for one device.
        strategy: as in `xdist.attention`.
        dropout: names what attention drops in training; its rate must be the model's.
        untested: accept a model_type that is not in `TESTED`.

    Returns:
        The handle: `handle.shard`, `handle.dropout`, `handle.detach()`.

    Raises:
        ConfigError: a model that cannot be attached, with the reason.
    """
    base = _checked_model(model, untested)
    _register()
    mesh = shard.mesh if isinstance(shard, SequenceShard) else shard
    handle = Attached(model, base, mesh, strategy, dropout)
    handle.shard = shard if isinstance(shard, SequenceShard) else None
    handle._attach()
    return handle


def library() -> Any:
    """The package `transformers`; the one place that imports it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "attaching a model of HuggingFace Transformers needs that library",
            str(error),
            'pip install "xdist-train[transformers]"',
        ) from error
    return transformers


def _register() -> None:
    package = library()
    package.AttentionInterface.register(NAME, registered.attention)
    package.AttentionMaskInterface.register(NAME, registered.mask)


def _checked_model(model: Any, untested: bool) -> Any:
    """The decoder inside `model`, after checking that it is one."""
    if not isinstance(model, library().PreTrainedModel):
        raise ConfigError(
            "attach takes a model of HuggingFace Transformers",
            f"got {type(model).__name__}",
            "attach the model before it is wrapped",
        )
    name, config, base = type(model).__name__, model.config, model.base_model
    if config._attn_implementation == NAME:
        raise ConfigError(f"{name} is attached already", "", "call handle.detach() first")
    if config.is_encoder_decoder or not (base is model or name.endswith("ForCausalLM")):
        raise ConfigError(
            "attach takes a decoder or a causal language model",
            f"got {name}",
            "attach the decoder inside it",
        )
    if config.model_type not in TESTED and not untested:
        raise ConfigError(
            f"models of type {config.model_type} are not known to equal their unsharded runs",
            f"known are {', '.join(sorted(TESTED))}",
            "compare with one rank yourself, and pass untested=True",
        )
    if not type(base)._supports_attention_backend:
        raise ConfigError(
            f"{name} does not use the library's attention interface",
            "",
            "a model with attention of its own cannot be attached",
        )
    return base
