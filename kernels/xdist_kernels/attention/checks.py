"""What every form of attention checks of a call before it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.errors import KernelError


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of `dtype` are added up in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_call(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, k_positions: Tensor, sinks: Tensor | None,
    dropout: Dropped | None,
) -> torch.dtype:  # fmt: skip
    """The dtype of sums, after the checks that keep wrong shapes from broadcasting.

    Raises KernelError; arguments as in torch.py.
    """
    wide = check_tensors(q, k, v, sinks, dropout)
    check_spans(q, k, spans, k_positions)
    return wide


def check_spans(q: Tensor, k: Tensor, spans: Spans, k_positions: Tensor) -> None:
    """Spans and positions must be those of q's queries and k's keys; else KernelError."""
    if k_positions.shape != (k.shape[1],):
        raise KernelError(f"{tuple(k_positions.shape)} key positions for {k.shape[1]} keys")
    if any(s.shape not in ((q.shape[1],), (q.shape[2], q.shape[1])) for s in spans):
        got = [tuple(s.shape) for s in spans]
        raise KernelError(f"spans are [n] or [H,n] with n {q.shape[1]}, H {q.shape[2]}: got {got}")


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, dropout: Dropped | None
) -> torch.dtype:
    """The rest of `check_call`."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise KernelError(f"attention needs q [B,n,H,D], k [B,m,G,D], v [B,m,G,E]: {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise KernelError(f"attention: q and k differ in batch or head dim: {shapes}")
    if q.shape[2] and (k.shape[2] == 0 or q.shape[2] % k.shape[2]):
        raise KernelError(f"{q.shape[2]} query heads do not divide into {k.shape[2]} key heads")
    if not q.dtype.is_floating_point or not q.dtype == k.dtype == v.dtype:
        raise KernelError(f"attention: one float dtype for all: {q.dtype}, {k.dtype}, {v.dtype}")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise KernelError(f"sinks {tuple(sinks.shape)} for {q.shape[2]} query heads")
    if dropout is not None and dropout.q_positions.shape != (q.shape[1],):
        given = tuple(dropout.q_positions.shape)
        raise KernelError(f"dropout has query positions {given} for {q.shape[1]} queries")
    if dropout is not None and not 0.0 <= dropout.rate < 1.0:
        raise KernelError(f"dropout takes a rate in [0, 1): got {dropout.rate}")
    return sum_dtype(q.dtype)
