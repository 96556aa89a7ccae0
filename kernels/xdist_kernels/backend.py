"""Which implementation of the kernels runs: chosen once, and said."""

from __future__ import annotations

import threading

from xdist_kernels.errors import KernelError

AVAILABLE = ("torch",)
_lock = threading.Lock()
_chosen: str | None = None


def backend() -> str:
    """The backend in use, choosing the default on the first call."""
    global _chosen
    with _lock:
        if _chosen is None:
            _chosen = AVAILABLE[0]
        return _chosen


def force_backend(name: str) -> None:
    """Makes `name` the backend of this process.

    Raises:
        KernelError: no such backend in this build, or another one is already in use.
    """
    global _chosen
    if name not in AVAILABLE:
        raise KernelError(
            f"kernel backend {name!r} was asked for and is not in this build\n"
            f"it has: {', '.join(AVAILABLE)}\nforce one of those, or none"
        )
    with _lock:
        if _chosen not in (None, name):
            raise KernelError(
                f"kernel backend {name!r} was asked for after {_chosen!r} was used\n"
                "results of one process must come from one backend\nforce it before the first call"
            )
        _chosen = name
