"""A card that is not there: tensors of torch's device type "lazy", which no backend implements,
whose values lie on the host, and process groups that carry these tensors alone, as NCCL's do.

A host tensor handed to such a group fails as it does with NCCL, by torch's own check; moves of
what lies on the card go through gloo. Imported for its effect by the ranks that need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

# The backend for init_process_group and new_group.
CARD_ONLY = "lazy:gloo"
_CARD = torch.device("lazy", 0)


class OnCard(Tensor):
    """A tensor that says it is on the card; `held` has its values, on the host."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=_CARD
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            return _moved(func, args)
        found = func(*_bare(args), **_bare(dict(kwargs or {})))
        return args[0] if func._schema.name.endswith("_") else found


def _moved(func: Any, args: tuple[Any, ...]) -> Any:
    """The backend of the group, called as the group would call it."""
    name = func._schema.name.partition("::")[2]
    group = next(value for value in args if isinstance(value, torch.ScriptObject))
    backend = ProcessGroup.unbox(group)._get_backend(_CARD)
    if name in ("send", "recv_"):
        tensors, _, peer, tag = args
        return getattr(backend, name.rstrip("_"))(_bare(tensors), peer, tag).boxed()
    # Gathers and sums of flat buffers: what is filled comes first.
    work = getattr(backend, name.rstrip("_"))(_bare(args[0]), _bare(args[1]))
    return args[0], work.boxed()


def _bare(values: Any) -> Any:
    return tree_map_only(OnCard, lambda tensor: tensor.held, values)


def _empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> OnCard:
    return OnCard(torch.empty(size, dtype=dtype))


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "Lazy")
