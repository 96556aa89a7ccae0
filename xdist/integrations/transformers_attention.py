"""What is registered with HuggingFace Transformers under xdist's name: a mask and an attention.

The library asks for a mask once a forward and kind, and hands the answer to its layers. Here the
answer is no tensor: it says which mask, and for which forward. A layer that is recomputed in
backward therefore uses the shard of its own forward.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xdist import ops
from xdist.dropout import Dropout
from xdist.errors import ConfigError, MaskError
from xdist.integrations.transformers_masks import recognised
from xdist.mask import Mask
from xdist.shard import SequenceShard


@dataclass(eq=False)
class Forward:
    """One forward of an attached model; `calls` counts the layers that attended."""

    shard: SequenceShard
    strategy: str
    dropout: Dropout | None
    owner: object
    before: Forward | None
    calls: int = 0


@dataclass(frozen=True, eq=False)
class Asked:
    """Stands where the library hands a mask tensor to its layers."""

    mask: Mask
    forward: Forward


running: ContextVar[Forward | None] = ContextVar("xdist_forward", default=None)
"""The attached forward that this thread is inside of."""


def mask(
    *,
    mask_function: Any,
    device: torch.device,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Asked:
    """The library's mask interface.

    Raises:
        MaskError: a mask that xdist does not know, or that the model adds to the library's.
        ConfigError: outside the forward of an attached model.
    """
    forward = running.get()
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
    return Asked(recognised(mask_function, local_size, probed), forward)


# What layers hand along that says nothing about attention, or that was refused before.
_IDLE = frozenset(
    (
        "position_ids",
        "use_cache",
        "cache_position",
        "past_key_values",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
    )
)


def attention(
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
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The library's attention interface: out `[B, n, H, E]`, and no weights.

    Args:
        module: the layer, for its number.
        query: `[B, H, n, D]`, rotated.
        key: `[B, G, n, D]`, rotated; G divides H.
        value: `[B, G, n, E]`.
        attention_mask: what `mask` answered.
        scaling: of the scores; None is `D ** -0.5`.
        dropout: the rate this layer drops in training.
        sliding_window: the layer's window, which must be the mask's.
        softcap: as in `xdist.attention`.
        s_aux: sinks `[H]`.
        is_causal: what the model's configuration says, which must be so of the mask too.
        others: refused unless None or known to say nothing about attention.

    Raises:
        MaskError: a mask made elsewhere, or another window or direction than the mask's.
        ConfigError: dropout that was not named, or an argument xdist does not know.
    """
    if not isinstance(attention_mask, Asked):
        raise MaskError(
            "the model made an attention mask without the library's mask interface",
            f"{type(module).__name__} got a {type(attention_mask).__name__}",
            "a model with masks of its own cannot be attached",
        )
    unknown = [name for name, x in others.items() if name not in _IDLE and x is not None]
    if unknown:
        raise ConfigError(
            f"xdist does not know the attention argument {', '.join(unknown)}",
            f"{type(module).__name__} passed it on",
            "leave it out; a model that needs it cannot be attached",
        )
    asked, forward = attention_mask.mask, attention_mask.forward
    _check_window(module, asked, sliding_window)
    _check_causal(module, asked, is_causal)
    out = ops.attention(
        *_one_dtype(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)),
        forward.shard,
        mask=asked,
        strategy=forward.strategy,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=_dropout(forward, module, dropout),
    )
    forward.calls += 1
    return out, None


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Autocast leaves rotated q and k in float32 beside v; the library's own paths cast too."""
    kind = q.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check_window(module: Any, asked: Mask, sliding_window: int | None) -> None:
    if sliding_window is None or asked.window in (sliding_window - 1, sliding_window):
        return
    raise MaskError(
        "a layer's sliding window is not that of its mask",
        f"layer {module.layer_idx} says {sliding_window}, the mask is {asked}",
        "give the model's configuration one window",
    )


def _check_causal(module: Any, asked: Mask, is_causal: bool | None) -> None:
    if is_causal is None or is_causal == asked.causal:
        return
    raise MaskError(
        f"a layer says is_causal={is_causal}, and its mask does not",
        f"the mask of {type(module).__name__} is {asked}",
        "give the model's configuration one is_causal, and leave it out of the call",
    )


def _dropout(forward: Forward, module: Any, rate: float) -> Dropout | None:
    """The layer's own drawing; the model's rate must be the one that was named."""
    named = forward.dropout
    if rate == 0.0:
        return None
    if named is None or named.rate != rate:
        raise ConfigError(
            f"the model drops {rate} of its attention probabilities in training",
            "no dropout was named" if named is None else f"dropout names a rate of {named.rate}",
            f"set handle.dropout = xdist.Dropout({rate}, seed, step), or attention_dropout to 0",
        )
    return replace(named, layer=module.layer_idx)
