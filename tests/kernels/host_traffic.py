"""What makes a host wait for its card: numbers read from tensors, and copies between the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Their results' shapes or values are the host's to know.
_READS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal}
_COPIES = {_aten._to_copy, _aten.copy_}
# Tensors made of Python's numbers: they are copied where no dispatch mode sees it.
_MADE = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class HostTraffic(TorchDispatchMode):
    """Lists both of this thread; tensors on meta stand for a card's."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.copies: list[str] = []
        self._made = _Made(self.copies)

    def __enter__(self) -> Any:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._made.__exit__(*raised)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in _READS:
            self.reads.append(str(func))
        if func.overloadpacket in _COPIES:
            tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
            if len({x.device.type for x in tensors}) > 1:
                shapes = [tuple(x.shape) for x in tensors]
                self.copies.append(f"{func} of {shapes}")
        return found


class _Made(TorchFunctionMode):
    def __init__(self, copies: list[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _MADE and found.device.type != "cpu":
            self.copies.append(f"{func} of {tuple(found.shape)}")
        return found
