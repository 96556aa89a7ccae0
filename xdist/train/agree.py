"""Steps that one rank alone can fail, made to fail on every rank at once.

A checkpoint that one rank cannot read, a chunk that is damaged in one rank's slice: the others
must hear of it instead of waiting in the next move until they time out.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from xdist import errors
from xdist.comm.broadcast import start_broadcast
from xdist.comm.gather import start_gather
from xdist.mesh import Mesh

T = TypeVar("T")
Shape = tuple[int, ...]
# What `share_tensor` sends at once.
SHARED_BLOCK_BYTES = 64 << 20


def together(mesh: Mesh, function: Callable[[], T]) -> T:
    """Run `function` on every rank; if it raises an XdistError on any, raise that one on all.

    The error of the lowest failing rank wins: same class, same three lines, with the attributes
    `rank` and `host` of where it happened. One gather of one int64 a rank when all is well.
    Errors of other kinds pass through: they are faults of the program.
    """
    error: errors.XdistError | None = None
    value: T | None = None
    try:
        value = function()
    except errors.PeerLost:
        # The group is gone: there is nobody left to agree with.
        raise
    except errors.XdistError as caught:
        error = caught
    message = b"" if error is None else _encode(error, mesh)
    sizes = gather_rows(torch.tensor([len(message)]), mesh)[:, 0].tolist()
    if any(sizes):
        whole = _gather_uneven(_as_tensor(message), sizes, mesh)
        first = next(size for size in sizes if size)
        raise _decode(_as_bytes(whole[:first])) from error
    return value  # type: ignore[return-value]


def gather_rows(row: Tensor, mesh: Mesh) -> Tensor:
    """Every rank's `row` [k] as the rows of one tensor [ranks, k], in rank order, on the CPU."""
    ranks = mesh.world_size
    if mesh.parameter_group is None:
        return row.cpu().reshape(1, -1)
    sizes = [row.numel()] * ranks
    return _gather_uneven(row, sizes, mesh).reshape(ranks, -1)


def share_json(value: object, mesh: Mesh) -> object:
    """Rank 0's JSON value on every rank; other ranks' `value` is not looked at."""
    if mesh.parameter_group is None:
        return value
    text = json.dumps(value).encode() if mesh.world_rank == 0 else b""
    size = int(gather_rows(torch.tensor([len(text)]), mesh)[0, 0])
    sizes = [size] + [0] * (mesh.world_size - 1)
    whole = _gather_uneven(_as_tensor(text), sizes, mesh)
    return json.loads(_as_bytes(whole))


def share_json_rows(value: object, mesh: Mesh) -> list[Any]:
    """Every rank's JSON value, in rank order."""
    text = json.dumps(value).encode()
    sizes = gather_rows(torch.tensor([len(text)]), mesh)[:, 0].tolist()
    whole = _as_bytes(_gather_uneven(_as_tensor(text), sizes, mesh))
    ends = list(itertools.accumulate(sizes))
    return [json.loads(whole[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def share_tensor(tensor: Tensor | None, shape: Shape, dtype: torch.dtype, mesh: Mesh) -> Tensor:
    """Rank 0's `tensor` of this shape and dtype on every rank, on the CPU, bit for bit.

    Other ranks' `tensor` is not looked at. It travels in blocks, so that no rank holds more than
    the tensor and one block.
    """
    if mesh.parameter_group is None:
        assert tensor is not None
        return tensor
    root = mesh.world_rank == 0 and tensor is not None
    whole = tensor.contiguous() if root and tensor is not None else torch.empty(shape, dtype=dtype)
    # Bytes: every transport sends them, and no value is looked at on the way.
    flat = whole.view(-1).view(torch.uint8)
    for block in flat.split(SHARED_BLOCK_BYTES):
        if not block.numel():
            continue
        # Of the other ranks' tensor only the shape matters: it needs no memory.
        like = block if root else torch.zeros((), dtype=torch.uint8).expand(block.shape)
        got = start_broadcast(like.to(mesh.device), mesh.parameter_group, root=0).wait()
        if not root:
            block.copy_(got)
    return whole


def _gather_uneven(x: Tensor, sizes: list[int], mesh: Mesh) -> Tensor:
    if mesh.parameter_group is None:
        return x
    return start_gather(x, mesh.parameter_group, dim=0, sizes=sizes).wait().cpu()


def _as_tensor(text: bytes) -> Tensor:
    # Of an empty buffer torch makes no tensor.
    return torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)[: len(text)]


def _as_bytes(values: Tensor) -> bytes:
    return values.numpy().tobytes()


def _encode(error: errors.XdistError, mesh: Mesh) -> bytes:
    fields = {
        "kind": type(error).__name__,
        "lines": [error.what, error.why, error.do],
        "rank": mesh.world_rank,
        "ranks": mesh.world_size,
        "host": socket.gethostname(),
    }
    return json.dumps(fields).encode()


def _decode(message: bytes) -> errors.XdistError:
    fields = json.loads(message)
    kind = getattr(errors, fields["kind"], errors.XdistError)
    what, why, do = fields["lines"]
    if fields["ranks"] > 1:
        what = f"rank {fields['rank']} on {fields['host']}: {what}"
    error: errors.XdistError = kind(what, why, do)
    error.rank = fields["rank"]  # type: ignore[attr-defined]
    error.host = fields["host"]  # type: ignore[attr-defined]
    error.agreed = True  # type: ignore[attr-defined]
    return error
