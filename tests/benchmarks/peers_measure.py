"""What each rank measures of a method: time beside others, and memory, bytes, results alone."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import torch
from peers_methods import METHODS, Attention, Sizes, layout_of
from torch import Tensor

import xdist
from xdist.mesh import Mesh
from xdist.testing import count_c10d_bytes

KIB = 2**10
_BLOCK = 128
# Set before a process of `alone` starts: every tensor then is a mapping of its own, which goes back
# to the system when it is freed; glibc otherwise keeps blocks of up to 32 MiB.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
Share = tuple[Tensor, Tensor, Tensor, Tensor]


def drawn(sizes: Sizes, segments: list[tuple[int, int]]) -> Share:
    """q, k, v and the output's gradient of the given tokens, the same for every layout."""
    shapes = [sizes.heads, sizes.groups, sizes.groups, sizes.heads]
    block = min(_BLOCK, sizes.tokens)
    found: list[list[Tensor]] = [[] for _ in shapes]
    for start, stop in segments:
        for number in range(start // block, -(-stop // block)):
            generator = torch.Generator().manual_seed(number)
            first = number * block
            for place, heads in zip(found, shapes, strict=True):
                x = torch.randn(1, block, heads, sizes.dim, generator=generator)
                place.append(x[:, max(0, start - first) : stop - first])
    q, k, v, dout = (torch.cat(parts, dim=1) for parts in found)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def _share(name: str, sizes: Sizes, mesh: Mesh) -> Share:
    layout = layout_of(name, sizes, mesh.sequence_size)
    return drawn(sizes, list(layout.segments(mesh.sequence_rank)))


def _mesh() -> Mesh:
    return xdist.init_mesh(ring=xdist.rank.read_rank().world_size)


def _pass(attention: Attention, share: Share) -> tuple[Tensor, ...]:
    *inputs, dout = share
    out = attention(*inputs)
    return out, *torch.autograd.grad(out, inputs, dout)


def interleaved(names: list[str], sizes: Sizes, rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """(wall, CPU) seconds of forward and backward on this rank, by method, one entry a round.

    Each round runs every method once, beginning with another one; ranks start together.
    """
    mesh = _mesh()
    built = {name: METHODS[name].build(sizes, mesh) for name in names}
    # One share a layout: methods that hold the same tokens read the same tensors.
    by_layout = {METHODS[name].zigzag: name for name in names}
    shares = {zigzag: _share(name, sizes, mesh) for zigzag, name in by_layout.items()}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    gc.freeze()  # what was imported needs no search each time
    for number in range(-1, rounds):  # one to warm up
        turn = number % len(names)
        # Every other round goes backwards, so that no method always follows the same one.
        order = (names[turn:] + names[:turn])[:: 1 if number % 2 else -1]
        for name in order:
            gc.collect()
            torch.distributed.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            got = _pass(built[name], shares[METHODS[name].zigzag])
            spent = time.perf_counter() - wall, time.process_time() - cpu
            del got
            if number >= 0:
                found[name].append(spent)
    return found


def alone(name: str, sizes: Sizes, warm: Sizes) -> dict[str, Any]:
    """Memory over what was held before, bytes, and results of the first key head's query heads.

    In a process of its own, after a small pass that loads what is loaded once. A method that
    raises is answered by its words.
    """
    mesh = _mesh()
    try:
        with count_c10d_bytes():  # what a first dispatch mode loads counts for no method
            _pass(METHODS[name].build(warm, mesh), _share(name, warm, mesh))
        attention, share = METHODS[name].build(sizes, mesh), _share(name, sizes, mesh)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    before = _reset_peak()
    with count_c10d_bytes() as moved:
        results = _pass(attention, share)
    peak = _status("VmHWM") - before
    first = slice(0, sizes.heads // sizes.groups)
    key = slice(0, 1)
    parts = zip(results, (first, first, key, key), strict=True)
    layout = layout_of(name, sizes, mesh.sequence_size)
    return {
        "peak_bytes": peak * KIB,
        "moved_bytes": moved.sent_bytes + moved.received_bytes,
        "results": [x[:, :, heads].detach().clone() for x, heads in parts],
        "segments": list(layout.segments(mesh.sequence_rank)),
    }


def _reset_peak() -> int:
    """Makes the resident set now the highest so far; gives it in KiB."""
    gc.collect()
    # What was freed must not hide what is taken: see also MEMORY_ENVIRONMENT.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"this system does not tell a process its {field}")
