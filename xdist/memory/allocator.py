"""How this process gets its memory from the system: less waiting on fresh pages.

A page touched for the first time costs 1.5 us in a virtual machine, 11 us if its host has not
backed it yet (measured): a stream of 192 MiB is 49,152 of them. Huge pages make that 96.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_HUGE_PAGES = 14  # MADV_HUGEPAGE, madvise(2)
_HUGE_BYTES = 2**21
# Tiles are below this and stay in the heap; streams are above and go back when they are freed.
_KEPT_BYTES = 32 * 2**20


def keep_small_blocks() -> bool:
    """Keep freed blocks below 32 MiB for the next tile. Whole process; True where it took effect.

    Only glibc on Linux has the two settings; elsewhere nothing changes.
    """
    libc = _libc()
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    kept = libc.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
    return bool(kept and libc.mallopt(_TRIM_THRESHOLD, 8 * _KEPT_BYTES))


def stream_like(x: Tensor) -> Tensor:
    """An empty tensor like x, [B, n, C] contiguous; on Linux in huge pages when it is large."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    libc = _libc()
    if x.device.type == "cpu" and out.nbytes >= _KEPT_BYTES and libc is not None:
        start = -(-out.data_ptr() // _HUGE_BYTES) * _HUGE_BYTES
        stop = (out.data_ptr() + out.nbytes) // _HUGE_BYTES * _HUGE_BYTES
        # Advice only: where huge pages are off the call fails and small pages serve.
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _HUGE_PAGES)
    return out


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
