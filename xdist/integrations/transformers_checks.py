"""What a call of an attached model may not ask for: checked before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xdist.comm.checks import raise_together
from xdist.errors import ConfigError, MaskError, ShapeError
from xdist.shard import SequenceShard

# Arguments that would need tokens of other ranks, and what to do instead.
_REFUSED = {
    "labels": "compute the loss by xdist.cross_entropy, with labels shifted by global position",
    "past_key_values": "a cache of keys is for generation: detach and use one device",
    "use_cache": "a cache of keys is for generation: detach and use one device",
    "output_attentions": "attention weights are never made; leave it out",
    "output_router_logits": "the balancing loss is a mean over the whole batch; leave it out",
    "logits_to_keep": "a rank's last tokens are not the sequence's last; slice the logits by "
    "shard.positions",
    "cu_seq_lens_q": "documents belong to the shard: SequenceShard(mesh, layout, documents)",
    "cu_seq_lens_k": "documents belong to the shard: SequenceShard(mesh, layout, documents)",
}


def refuse_arguments(values: Mapping[str, Any]) -> None:
    """Refuses arguments of a forward that a rank alone cannot honour.

    Raises:
        ConfigError: one that is given and not None, False or 0.
    """
    for name, remedy in _REFUSED.items():
        value = values.get(name)
        if isinstance(value, Tensor) or value:
            raise ConfigError(f"a model attached to xdist does not take {name}", "", remedy)


def refuse_settings(config: Any) -> None:
    """Refuses settings of the configuration that would be arguments `refuse_arguments` refuses."""
    for name in ("output_attentions", "output_router_logits"):
        if getattr(config, name, False):
            raise ConfigError(
                f"a model attached to xdist does not honour config.{name}", "", _REFUSED[name]
            )


def refuse_random(model: nn.Module, config: Any) -> None:
    """Refuses dropout outside attention: torch draws it from a state of each rank's own.

    Raises:
        ConfigError: the model trains, and has a Dropout module or setting above 0.
    """
    if not model.training:
        return
    found = [
        f"{name} (p={module.p})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    ]
    for name, value in vars(config).items():
        outside = ("drop" in name or "jitter" in name) and "att" not in name
        if outside and isinstance(value, float) and value > 0:
            found.append(f"config.{name} = {value}")
    if found:
        raise ConfigError(
            "random numbers outside attention would depend on the number of ranks",
            ", ".join(found[:4]),
            "set them to 0 (dropout inside attention is attach(..., dropout=...)), or call eval()",
        )


def tokens_of(values: Mapping[str, Any]) -> Tensor | None:
    """input_ids `[B, n]`, or inputs_embeds `[B, n, C]` where there are none."""
    found = values.get("input_ids")
    return values.get("inputs_embeds") if found is None else found


def checked_tokens(values: Mapping[str, Any], shard: SequenceShard) -> Tensor:
    """The tokens or embeddings of a call, after they are found to be this rank's share.

    Raises:
        ShapeError: another number of tokens than the shard gives this rank, none at all, or a
            layout that leaves a rank without tokens, which the library's layers do not take.
    """
    tokens = tokens_of(values)
    if tokens is None or tokens.dim() < 2:
        raise ShapeError(
            "an attached model needs input_ids [B, n] or inputs_embeds [B, n, C]",
            "got none" if tokens is None else f"got {tuple(tokens.shape)}",
        )
    if 0 in shard.layout.local_lengths:
        raise ShapeError(
            "a model of Transformers needs a token on every rank",
            f"the ranks hold {list(shard.layout.local_lengths)} of {shard.layout.length}",
            "use fewer sequence ranks, or a layout without empty shares",
        )
    if tokens.shape[1] != shard.local_length:
        raise ShapeError(
            f"the model got {tokens.shape[1]} tokens",
            f"rank {shard.rank} of {shard.size} holds {shard.local_length} of "
            f"{shard.layout.length}",
            "pass shard.scatter(tokens), or set handle.shard to this batch's shard",
        )
    return tokens


def check_given(values: Mapping[str, Any], shard: SequenceShard) -> None:
    """Compares attention_mask and position_ids, where given, with what the shard says.

    Their values differ from rank to rank, so the ranks agree on the verdict (8 control bytes to
    each other rank for each of the two that is given).

    Raises:
        MaskError: a padding mask, or a mask of another kind.
        ShapeError: positions that contradict the shard.
    """
    mask = values.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise MaskError(
                "an attached model makes its masks itself",
                f"attention_mask is a {type(mask).__name__}",
                "leave it out; documents belong to the shard",
            )
        raise_together(shard.group, not bool((mask != 0).all()), _padded)
    given = values.get("position_ids")
    if given is not None:
        own = shard.document_positions.to(given.device)
        same = given.shape[-1] == own.shape[0] and bool(torch.all(given == own))
        raise_together(shard.group, not same, _displaced)


def _padded(ranks: list[int]) -> MaskError:
    return MaskError(
        "padding masks are not supported",
        f"attention_mask has zeros on sequence ranks {ranks}",
        "pack the documents without padding and give the shard their cu_seqlens",
    )


def _displaced(ranks: list[int]) -> ShapeError:
    return ShapeError(
        "position_ids contradict the shard",
        f"they are not the positions inside the documents on sequence ranks {ranks}",
        "leave them out, or pass shard.document_positions; documents belong to the shard",
    )
