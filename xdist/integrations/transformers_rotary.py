"""Rotary frequencies that depend on how long a sequence is, when a rank holds a part of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from xdist.integrations.transformers_attention import running


def follow_whole_length(model: nn.Module) -> list[Any]:
    """Hooks that show rotary modules of kinds "dynamic" and "longrope" the longest document.

    They take the sequence's length from the largest position they are given, which is a rank's
    own. One more position, the whole sequence's largest, is added for the module and cut off
    from what it returns; nothing is sent. Other kinds need no hook.
    """
    hooks: list[Any] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(
            isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names
        ):
            hooks.append(module.register_forward_pre_hook(_with_largest, with_kwargs=True))
            hooks.append(module.register_forward_hook(_without_largest))
    return hooks


def _with_largest(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    forward = running.get()
    if forward is None:
        return args, kwargs
    positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    cuts = forward.shard.documents.cu_seqlens
    longest = max(stop - start for start, stop in pairwise(cuts))
    largest = positions.new_full((positions.shape[0], 1), max(longest - 1, 0))
    seen = torch.cat([positions, largest], dim=1)
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": seen}
    return (args[0], seen, *args[2:]), kwargs


def _without_largest(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    if running.get() is None:
        return output
    if isinstance(output, Tensor):
        return output[:, :-1]
    return tuple(part[:, :-1] for part in output)
