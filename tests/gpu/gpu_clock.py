"""How long a call takes on a card, what it keeps, and the two ceilings of the card.

Device work is asynchronous: times are those between two events on the device, medians of calls
that each find the second-level cache filled with something else. The host's part, how long Python
takes to start the work, is a number of its own: where it is the larger, the device waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    # A command's own process, which only watches, starts without torch.
    import torch
    from torch import Tensor

# Larger than any card's second-level cache.
_FLUSH_BYTES = 256 << 20
_SPENT_S = 0.25
MOST, LEAST = 50, 3


class Time(NamedTuple):
    """Milliseconds: median, quartiles, and the host's part of one call."""

    ms: float
    low_ms: float
    high_ms: float
    host_ms: float


def measure(call: Callable[[], Any], device: str, *, spent_s: float = _SPENT_S) -> Time:
    """Times `call` after two calls that compile and warm up; on a CPU one call, just made."""
    import torch

    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        call()
        ms = 1e3 * (time.perf_counter() - began)
        return Time(ms, ms, ms, ms)
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    about = time.perf_counter() - began
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events = []
    for _ in range(max(LEAST, min(MOST, round(spent_s / max(about, 1e-6))))):
        flush.zero_()
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        call()
        events[-1][1].record()
    torch.cuda.synchronize()
    found = sorted(begin.elapsed_time(end) for begin, end in events)
    hosts = []
    for _ in range(3 if about < 1 else 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        hosts.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    quarter = len(found) // 4
    return Time(
        statistics.median(found), found[quarter], found[-1 - quarter], statistics.median(hosts)
    )


def forward_backward(
    call: Callable[[], Tensor], inputs: list[Tensor], dout: Tensor
) -> Callable[[], None]:
    """One forward and one backward pass to `inputs`; no gradient is kept, nor added to one."""
    import torch

    def run() -> None:
        torch.autograd.grad(call(), inputs, dout, allow_unused=True)

    return run


def peak_gib(call: Callable[[], Any], device: str) -> float:
    """What `call` allocates at most beside what was there before; NaN where no card counts it."""
    import torch

    if torch.device(device).type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_gb_s(device: str, *, small: bool) -> float:
    """GB/s of a large copy on the device, bytes read and bytes written counted."""
    import torch

    size = 1 << 16 if small else 1 << 31
    source = torch.empty(size, dtype=torch.int8, device=device).random_(-100, 100)
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), device).ms
    return 2 * size / ms / 1e6


def matmul_tflops(device: str, dtype: torch.dtype, *, small: bool) -> float:
    """TFLOP/s of a large square matrix product of random numbers in `dtype`."""
    import torch

    size = 64 if small else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ms = measure(lambda: a @ b, device).ms
    return 2 * size**3 / ms / 1e9


def ceilings(device: str, *, small: bool) -> dict[str, float]:
    """The row that stands beside every table of times."""
    import torch

    return {
        "copy (GB/s)": copy_gb_s(device, small=small),
        "bf16 product (TFLOP/s)": matmul_tflops(device, torch.bfloat16, small=small),
        "fp32 product (TFLOP/s)": matmul_tflops(device, torch.float32, small=small),
    }
