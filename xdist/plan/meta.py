"""Tensors of the meta device, which have shapes and no values: what runs on them, what they hold.

Two things need more than shapes. Where documents start is known from the layout alone, and code
picks rows by it: such integers keep their values in a CPU copy beside the meta tensor. And a
number that is read back from a tensor without values is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten


class MetaRun(TorchDispatchMode):
    """Runs a model on meta tensors and counts the bytes that its tensors would hold.

    `live_bytes` is what meta tensors made inside the block hold now, `peak_bytes` the most they
    held; storages count once, whatever the number of views. Autograd run from this thread counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known = WeakIdKeyDictionary()  # meta tensor -> the same values on the CPU
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors(args) + (_tensors(kwargs) if kwargs else [])
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._value(args[0])
        if self._computable(func, given, kwargs):
            out = self._with_values(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for tensor in [out] if type(out) is Tensor else _tensors([out]):
            self._hold(tensor)
        return out

    def _value(self, tensor: Tensor) -> Any:
        if tensor in self._known:
            return self._known[tensor].item()
        return 1 if not tensor.is_floating_point() else 1.0

    def _computable(self, func: Any, given: list[Tensor], kwargs: dict[str, Any]) -> bool:
        """Whether the result is integers that follow from integers whose values are known."""
        if not given:
            return func in (aten.arange.default, aten.arange.start, aten.arange.start_step)
        if any(tensor.is_floating_point() for tensor in given):
            return False
        known = all(t in self._known for t in given if t.is_meta)
        # A copy that changes a dtype alone stays on the host.
        target = kwargs.get("device")
        from_host = func is aten._to_copy.default and target is not None and not given[0].is_meta
        return known and (from_host or any(t.is_meta for t in given))

    def _with_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def host(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_meta:
                return self._known[value]
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return [host(item) for item in value] if isinstance(value, list | tuple) else value

        values = func(*host(args), **{name: host(value) for name, value in kwargs.items()})
        target = kwargs.get("device")
        if isinstance(target, torch.device) and target.type != "meta":
            return values
        if func._schema.is_mutable:
            out = args[0]
        elif isinstance(values, Tensor):
            # Its shape may follow from values, so meta's own rule is not asked.
            out = torch.empty_like(values, device="meta")
        else:
            return func(*args, **kwargs)
        if not values.is_floating_point():
            self._known[out] = values
        return out

    def _hold(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= size


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values.values() if type(values) is dict else values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple, dict):
            found += _tensors(value)
    return found
