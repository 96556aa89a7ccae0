"""The selective scan over a sharded sequence: its checks and its request.

Bias, softplus, the skip D and the gate z are local to a token: they are applied before and after
the recurrence, on the rank that holds the token (selective_local.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from xdist.comm.checks import checks_are_on
from xdist.errors import ShapeError
from xdist.parallel.backend import chosen
from xdist.parallel.recurrences.selective import SelectiveScan
from xdist.parallel.recurrent import Request, Result, check_values
from xdist.parallel.selective_local import Local
from xdist.shard import SequenceShard
from xdist_kernels import selective_scan


def request(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    shard: SequenceShard,
    *,
    local: Local,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Request:
    """`xdist.selective_scan` with the shard resolved, checked; see there."""
    _check(u, delta, A, B, C, local)
    _check_state(u, A, initial_state, shard)
    delta = local.steps(delta)
    if checks_are_on():
        _check_values(u, delta, A, B, C, local, initial_state, shard)
    initial = None if initial_state is None else initial_state.unsqueeze(-1)
    inputs = (u.unsqueeze(3), delta.unsqueeze(3), A, B.unsqueeze(2), C.unsqueeze(2))
    backend = chosen("selective_scan", backend, u, lambda: selective_scan.refusal(*inputs))
    return Request(
        "selective_scan",
        SelectiveScan(backend),
        inputs,
        initial,
        output_final_state,
        reverse,
        partial(_finish, u, local),
    )


def _finish(u: Tensor, local: Local, result: Result) -> Result:
    """Skip and gate, and states without their dim of values."""
    if isinstance(result, Tensor):
        return local.finish(u, result.squeeze(3))
    out, final = result
    return local.finish(u, out.squeeze(3)), final.squeeze(-1)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, local: Local) -> None:
    if u.dim() == 3 and u.shape[0] < 1:
        raise ShapeError("selective_scan needs a batch of at least 1", f"u is {tuple(u.shape)}")
    if u.dim() != 3 or A.dim() != 2:
        raise ShapeError(
            "selective_scan: u must be [B,n,C] and A [C,N]",
            f"got {tuple(u.shape)} and {tuple(A.shape)}",
        )
    tokens, channels = tuple(u.shape), u.shape[2:]
    by_state = (*u.shape[:2], A.shape[1])
    wanted = {
        "delta": (delta, "[B,n,C]", tokens),
        "A": (A, "[C,N]", (*channels, A.shape[1])),
        "B": (B, "[B,n,N]", by_state),
        "C": (C, "[B,n,N]", by_state),
        "D": (local.D, "[C]", channels),
        "z": (local.z, "[B,n,C]", tokens),
        "delta_bias": (local.delta_bias, "[C]", channels),
    }
    for name, (x, axes, shape) in wanted.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ShapeError(
                f"selective_scan: {name} must be {axes} = {list(shape)} beside u [B,n,C] = "
                f"{list(tokens)}",
                f"got {list(x.shape)}",
            )
    kinds = {name: x.dtype for name, (x, _, _) in wanted.items() if x is not None}
    kinds["u"] = u.dtype
    if not all(kind.is_floating_point for kind in kinds.values()) or (
        (u.dtype == torch.float64) != (delta.dtype == torch.float64)
    ):
        raise ShapeError(
            "selective_scan needs floating point inputs, delta float64 where u is",
            ", ".join(f"{name} {kind}" for name, kind in kinds.items()),
        )


def _check_state(u: Tensor, A: Tensor, initial: Tensor | None, shard: SequenceShard) -> None:
    if initial is None:
        return
    count = (shard.documents.count,) if shard.packed else ()
    wanted = [u.shape[0], *count, *A.shape]
    if list(initial.shape) != wanted:
        axes = "[B, documents, C, N]" if shard.packed else "[B, C, N]"
        raise ShapeError(
            f"selective_scan: initial_state must be {axes} = {wanted}", f"got {list(initial.shape)}"
        )


def _check_values(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    local: Local,
    initial: Tensor | None,
    shard: SequenceShard,
) -> None:
    least = float(delta.min()) if delta.numel() else 0.0
    highest = float(A.max()) if A.numel() else 0.0
    check_values(
        "selective_scan",
        shard,
        (u, delta, A, B, C, local.D, local.z, initial),
        least < 0 or highest > 0,
        "delta (after bias and softplus) at least 0 and A at most 0",
        least_delta=least,
        highest_A=highest,
    )
