"""Bytes counted a second way: by a dispatch mode over torch's own c10d operations.

Independent of the ledger, by the same convention: what goes to and comes from other ranks, as if
each pair exchanged directly. Also counts traffic that is not xdist's (DDP, FSDP, DeepSpeed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xdist.comm.collectives import boxed_size_and_rank
from xdist.errors import XdistError


@dataclass
class CountedBytes:
    """Bytes this rank sent and received, and how often each c10d operation ran."""

    sent_bytes: int = 0
    received_bytes: int = 0
    ops: dict[str, int] = field(default_factory=dict)


@contextmanager
def count_c10d_bytes() -> Iterator[CountedBytes]:
    """Count the c10d operations of this thread and of autograd run from it."""
    counted = CountedBytes()
    with _Counter(counted):
        yield counted


class _Counter(TorchDispatchMode):
    def __init__(self, counted: CountedBytes) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            self._count(func, args)
        elif func.namespace not in ("aten", "prim", "prims", "_c10d_functional", "profiler"):
            # A torch.library op may communicate, and a mode is popped while it runs: enter it
            # again, and go straight to the op's kernel so as not to arrive here twice.
            device = next((a.device for a in _tensors([args, kwargs])), torch.device("cpu"))
            key = torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.partition("::")[2]
        self.counted.ops[name] = self.counted.ops.get(name, 0) + 1
        named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}
        size, me = next((found for v in args if (found := boxed_size_and_rank(v))), (1, 0))
        sent, received = _bytes_of(name, named, args, size, me)
        self.counted.sent_bytes += sent
        self.counted.received_bytes += received


def _bytes_of(
    name: str, named: dict[str, Any], args: tuple[Any, ...], size: int, me: int
) -> tuple[int, int]:
    """Sent and received bytes of one operation on this rank of `size`."""
    tensors = [_nbytes(value) for value in args if _tensors(value)]
    if name == "send":
        return tensors[0], 0
    if name in ("recv_", "recv_any_source_"):
        return 0, tensors[0]
    if name == "alltoall_base_":
        out, inp = named["output"], named["input"]
        return (
            _to_others(inp, named["input_split_sizes"], size, me),
            _to_others(out, named["output_split_sizes"], size, me),
        )
    if name == "alltoall_":
        out, inp = args[0], args[1]
        return _nbytes(inp) - inp[me].nbytes, _nbytes(out) - out[me].nbytes
    if name.startswith(("allgather", "_allgather")):
        own = tensors[1]
        return own * (size - 1), tensors[0] - own
    if name.startswith(("reduce_scatter", "_reduce_scatter")):
        own, whole = tensors[0], tensors[1]
        return whole - own, own * (size - 1)
    if name.startswith("allreduce"):
        return _all_reduce(tensors[0], size)
    if name == "broadcast_":
        root = int(named["root_rank"]) == me
        return (tensors[0] * (size - 1), 0) if root else (0, tensors[0])
    if name in ("barrier", "monitored_barrier_"):
        return 0, 0
    raise XdistError(f"count_c10d_bytes does not know the operation c10d::{name}")


def _all_reduce(nbytes: int, size: int) -> tuple[int, int]:
    # Reduce-scatter and all-gather of even shares; the remainder is at most a few elements.
    moved = 2 * nbytes * (size - 1) // size
    return moved, moved


def _to_others(whole: Tensor, splits: list[int], size: int, me: int) -> int:
    if not splits:
        return whole.nbytes - whole.nbytes // size
    return whole.nbytes - splits[me] * (whole.nbytes // max(1, sum(splits)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _nbytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(value))
