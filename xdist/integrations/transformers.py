"""A decoder of HuggingFace Transformers, unmodified, under a shard."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xdist import ops
from xdist.dropout import Dropout
from xdist.errors import ConfigError, MaskError
from xdist.integrations.transformers_checks import (
    check_given,
    checked_tokens,
    refuse_arguments,
    refuse_random,
    refuse_settings,
)
from xdist.integrations.transformers_masks import recognised
from xdist.mask import Mask
from xdist.mesh import Mesh
from xdist.shard import SequenceShard, resolve

NAME = "xdist"
"""What the attention interface is called in the library's registry and an attached config."""

TESTED = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_oss")
)
"""`config.model_type` of the families whose sharded runs are held to equal the unsharded ones."""


@dataclass(eq=False)
class _Forward:
    """One forward of an attached model: what its layers need, also when they are recomputed."""

    handle: Attached
    shard: SequenceShard
    dropout: Dropout | None
    calls: int = 0
    before: _Forward | None = None


@dataclass(frozen=True, eq=False)
class _Asked:
    """Stands where the library hands a mask tensor to its layers."""

    mask: Mask
    forward: _Forward


_running: ContextVar[_Forward | None] = ContextVar("xdist_running", default=None)


class Attached:
    """What `attach` returns: the shard of the next batch, and the way back.

    Attributes:
        shard: where the next batch's tokens lie; set it before each forward whose layout or
            documents differ.
        dropout: names what attention drops in training; set it before each step.
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
        configs = {
            id(value): value
            for module in self.model.modules()
            for value in vars(module).values()
            if isinstance(value, _config_class())
        }
        # Another model may have been made from the same object: this one gets its own.
        copies = dict(zip(configs, copy.deepcopy(list(configs.values())), strict=True))
        for own in copies.values():
            own._attn_implementation_internal = NAME
            own.use_cache = False
        for module in self.model.modules():
            for name, value in list(vars(module).items()):
                if id(value) in copies:
                    self._replaced.append((module, name, value))
                    setattr(module, name, copies[id(value)])
        before = self.model.register_forward_pre_hook(self._check, with_kwargs=True)
        enter = self._base.register_forward_pre_hook(self._enter, with_kwargs=True)
        leave = self._base.register_forward_hook(self._leave, always_call=True)
        self._hooks = [before, enter, leave]

    def _check(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            raise ConfigError(
                "an attached model takes its arguments after input_ids by name",
                f"got {len(args)} without a name",
            )
        refuse_arguments(kwargs)
        refuse_settings(module.config)
        refuse_random(module, module.config)

    def _enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._check(module, args, kwargs)
        values = kwargs | ({"input_ids": args[0]} if args else {})
        shard = self._next_shard(values)
        batch = checked_tokens(values, shard)
        check_given(values, shard)
        # A mask of ones keeps the library from reading documents out of local positions.
        device = module.get_input_embeddings().weight.device
        ones = torch.ones((1, 1), dtype=torch.bool, device=device)
        kwargs = kwargs | {
            "attention_mask": ones.expand(batch, shard.local_length),
            "position_ids": shard.document_positions.to(device)[None],
        }
        _running.set(_Forward(self, shard, self.dropout, before=_running.get()))
        return args, kwargs

    def _next_shard(self, values: dict[str, Any]) -> SequenceShard:
        if self._shard is None and self.mesh is not None:
            raise ConfigError(
                "the attached model has no shard for this batch",
                "it was attached with a mesh",
                "set handle.shard = xdist.SequenceShard(mesh, layout, documents)",
            )
        tokens = values.get("input_ids")
        tokens = values.get("inputs_embeds") if tokens is None else tokens
        return resolve(self._shard, 0 if tokens is None else tokens.shape[1])

    def _leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        forward = _running.get()
        if forward is None or forward.handle is not self:
            return
        _running.set(forward.before)
        layers = module.config.num_hidden_layers
        if output is not None and forward.calls != layers:
            raise ConfigError(
                "some layers of the model do not attend through the library's interface",
                f"{forward.calls} of {layers} layers called it",
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

    The model is then called with this rank's tokens `[B, n]`, `model(input_ids=shard.scatter(x))`,
    and answers for the same positions. Rotary positions, documents, sliding windows, soft-caps,
    sinks and shared key heads are those of the model and of the shard. Weights are held whole: the
    gradient of each is this rank's part, which `xdist.reduce_gradients` sums.

    Nothing of the library is replaced: an attention interface named "xdist" is registered beside
    its own, and the model gets a copy of its configuration that names it. What moves is that of
    `xdist.attention`, once a layer; nothing else is sent.

    Args:
        model: a decoder (`...Model`) or causal language model (`...ForCausalLM`).
        shard: the first batch's shard (the handle's can be set for each batch), a mesh for shards
            to come, or None for one device.
        strategy: as in `xdist.attention`.
        dropout: names what is dropped in training; its rate must be the model's.
        untested: accept a model_type that is not in `TESTED`.

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


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "attaching a model of HuggingFace Transformers needs that library",
            str(error),
            'pip install "xdist-train[transformers]"',
        ) from error
    return transformers


def _config_class() -> Any:
    return _library().PreTrainedConfig


def _checked_model(model: Any, untested: bool) -> Any:
    """The decoder inside `model`, after checking that it is one."""
    if not isinstance(model, _library().PreTrainedModel):
        raise ConfigError(
            "attach takes a model of HuggingFace Transformers", f"got {type(model).__name__}"
        )
    name, kind, base = type(model).__name__, model.config.model_type, model.base_model
    if model.config._attn_implementation == NAME:
        raise ConfigError(f"{name} is attached already", "", "call handle.detach() first")
    if model.config.is_encoder_decoder or not (base is model or name.endswith("ForCausalLM")):
        raise ConfigError(
            "attach takes a decoder or a causal language model",
            f"got {name}",
            "attach the decoder inside it",
        )
    if kind not in TESTED and not untested:
        raise ConfigError(
            f"models of type {kind} are not known to equal their unsharded runs",
            f"known are {', '.join(sorted(TESTED))}",
            "compare with one rank yourself, and pass untested=True",
        )
    if not type(base)._supports_attention_backend:
        raise ConfigError(f"{name} does not use the library's attention interface")
    return base


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(
    *,
    mask_function: Any,
    device: torch.device,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> _Asked:
    """The library asks for a mask: the answer says which, for the layers to hand back."""
    forward = _running.get()
    if forward is None:
        raise ConfigError(
            "a part of an attached model was called by itself", "", "call the model, or detach it"
        )
    if use_vmap or not (allow_is_causal_skip or allow_is_bidirectional_skip):
        raise MaskError(
            "the model adds a mask of its own to the library's",
            "such as tokens of an image that see each other",
            "turn it off in the model's configuration",
        )
    probed = torch.device("cpu") if device.type == "meta" else device
    return _Asked(recognised(mask_function, local_size, probed), forward)


# What layers hand along that says nothing about attention, or that `_check` has refused.
_IDLE = {
    "position_ids", "use_cache", "cache_position", "past_key_values", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch",
}  # fmt: skip


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The library's attention interface: q `[B, H, n, D]`, k and v `[B, G, n, D]`."""
    if not isinstance(attention_mask, _Asked):
        raise MaskError(
            "the model made an attention mask without the library's mask interface",
            f"{type(module).__name__} got a {type(attention_mask).__name__}",
        )
    unknown = [name for name, x in others.items() if name not in _IDLE and x is not None]
    if unknown:
        raise ConfigError(f"xdist does not know the attention argument {', '.join(unknown)}")
    asked, forward = attention_mask.mask, attention_mask.forward
    _check_window(module, asked, sliding_window)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):
        # Rotary positions are float32 under autocast, values are not.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = ops.attention(
        q, k, v, forward.shard, mask=asked, strategy=forward.handle.strategy, scale=scaling,
        softcap=softcap, sinks=s_aux, dropout=_dropout(forward, module, dropout),
    )  # fmt: skip
    forward.calls += 1
    return out, None


def _check_window(module: Any, asked: Mask, sliding_window: int | None) -> None:
    if sliding_window is None or asked.window in (sliding_window - 1, sliding_window):
        return
    raise MaskError(
        "a layer's sliding window is not that of its mask",
        f"layer {module.layer_idx} says {sliding_window}, the mask is {asked}",
    )


def _dropout(forward: _Forward, module: Any, rate: float) -> Dropout | None:
    """The layer's own drawing; the model's rate must be the one that was named."""
    named = forward.dropout
    if rate == 0.0:
        return None
    if named is None or named.rate != rate:
        raise ConfigError(
            f"the model drops {rate} of its attention probabilities in training",
            "no dropout was named" if named is None else f"dropout names a rate of {named.rate}",
            f"pass attach(..., dropout=xdist.Dropout({rate}, seed)), or set attention_dropout to 0",
        )
    return replace(named, layer=module.layer_idx)
