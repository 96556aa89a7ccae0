"""Prefix attention over a sharded sequence: its checks and its request."""

from __future__ import annotations

import torch
from torch import Tensor

from xdist.comm.checks import checks_are_on
from xdist.errors import ShapeError
from xdist.parallel.backend import chosen
from xdist.parallel.recurrences.prefix import PrefixAttention
from xdist.parallel.recurrent import Request, check_values
from xdist.shard import SequenceShard
from xdist_kernels import prefix


def request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    *,
    scale: float | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Request:
    """`xdist.prefix_attention` with the shard resolved, checked; see there."""
    _check(q, k, v)
    if checks_are_on():
        check_values("prefix_attention", shard, (q, k, v), False, "whatever their size")
    scale = q.shape[1] ** -0.5 if scale is None else scale
    backend = chosen("prefix_attention", backend, v, prefix.refusal)
    op = PrefixAttention(scale, backend)
    return Request("prefix_attention", op, (q, k, v), reverse=reverse)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 2 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError(
            "prefix_attention: q must be [H,D], k [B,n,H,D] and v [B,n,H,V]", f"got {shapes}"
        )
    if tuple(k.shape[2:]) != tuple(q.shape) or k.shape[:3] != v.shape[:3]:
        raise ShapeError(
            "prefix_attention: k and v must have the batch, tokens and heads of each other, and "
            "k the heads and head dim of q",
            f"got {shapes}",
        )
    kinds = {q.dtype, k.dtype, v.dtype}
    if not all(kind.is_floating_point for kind in kinds) or (
        torch.float64 in kinds and len(kinds) > 1
    ):
        raise ShapeError(
            "prefix_attention needs floating point inputs, all float64 or none",
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
        )
