"""What linear attention takes: the forms of a decay, and shapes and dtypes that fit."""

from __future__ import annotations

from torch import Tensor

from xdist_kernels.errors import KernelError


def check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Raise KernelError unless shapes and dtypes fit: log_decay None, [H], [B,n,H] or [B,n,H,K]."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise KernelError(f"q and k must be [B,n,Hk,K] and v [B,n,H,V]; got {shapes}")
    if min(q.shape[3], v.shape[3]) < 1:
        raise KernelError(f"head dims must be at least 1; got {shapes}")
    if v.shape[2] % max(1, q.shape[2]) or bool(q.shape[2]) != bool(v.shape[2]):
        raise KernelError(f"value heads must be a multiple of key heads; got {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise KernelError(f"one floating dtype is needed; got {q.dtype}, {k.dtype}, {v.dtype}")
    if log_decay is None:
        return
    if tuple(log_decay.shape) not in (
        (v.shape[2],),
        tuple(v.shape[:3]),
        (*v.shape[:3], q.shape[3]),
    ):
        raise KernelError(
            f"log_decay must be [H], [B,n,H] or [B,n,H,K]; got {tuple(log_decay.shape)}, {shapes}"
        )
    if not log_decay.is_floating_point():
        raise KernelError(f"log_decay must be floating; got {log_decay.dtype}")


def canonical_decay(log_decay: Tensor | None, v: Tensor, key_dim: int) -> Tensor | None:
    """[H], [B,n,H] or [B,n,H,K] -> a [B,n,H,1] or [B,n,H,K] view; None stays None."""
    if log_decay is None or log_decay.dim() == 4:
        return log_decay
    if log_decay.dim() == 1:
        return log_decay.view(1, 1, -1, 1).expand(*v.shape[:3], 1)
    return log_decay[..., None]
