"""The calls whose kernels are compiled ahead of time: each kernel, flag, dtype and size of head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.linear import bidirectional, triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """decay: dims of log_decay's last axis, "none", "scalar" or "diagonal", and of_decay its dtype;
    group: value heads that share a key head; lone: so few tokens that a head is one span."""

    decay: str
    key_dim: int
    width: int
    dtype: torch.dtype
    packed: bool = False
    group: int = 1
    lone: bool = False
    of_decay: torch.dtype = FP32

    @property
    def name(self) -> str:
        flags = [
            *(["documents"] if self.packed else []),
            *(["shared heads"] if self.group > 1 else []),
            *(["one span"] if self.lone else []),
            *([f"decay {_short(self.of_decay)}"] if self.of_decay != FP32 else []),
        ]
        return " ".join([self.decay, f"{self.key_dim}x{self.width}", _short(self.dtype), *flags])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed() -> Iterator[Case]:
    for decay in ("none", "scalar", "diagonal"):
        for dims in ((64, 64), (128, 128), (256, 256)):
            yield Case(decay, *dims, BF16)
        yield Case(decay, 128, 128, BF16, packed=True)
        yield Case(decay, 128, 128, FP16, lone=True)
        yield Case(decay, 128, 64, FP32, group=2)
        yield Case(decay, 256, 256, FP32)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    batch, heads, tokens = 2, 2 * case.group, 256 if case.lone else 4096
    shape = (batch, tokens, heads)

    def made(*sizes: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    q, k = (made(batch, tokens, 2, case.key_dim) for _ in range(2))
    v = made(*shape, case.width)
    dims = {"none": 0, "scalar": 1, "diagonal": case.key_dim}[case.decay]
    decay = made(*shape, dims, dtype=case.of_decay) if dims else None
    starts = made(tokens, dtype=torch.bool) if case.packed else None
    return q, k, v, decay, starts


def _tile(case: Case) -> None:
    q, k, v, decay, starts = _inputs(case)
    p = triton.prepare(q, k, v, decay, scale=0.125, starts=starts)
    shape = (v.shape[0], v.shape[2], case.key_dim, case.width)
    state = torch.empty(shape, dtype=torch.float32, device="meta")
    triton.advance(p, state)
    out, end = triton.run(p, state)
    triton.adjoint(p, out, end)
    triton.backward(p, state, out, end)


def _both(case: Case) -> None:
    q, k, v, decay, starts = _inputs(case)
    shape = (v.shape[0], v.shape[2], case.key_dim, case.width)
    state = torch.empty(shape, dtype=torch.float32, device="meta")
    sides = bidirectional.Sides(state, state)
    inputs = (q, k, v, decay, starts)
    out, after = bidirectional.run_merged(*inputs, sides, scale=0.125)
    bidirectional.backward_merged(*inputs, sides, out, after, scale=0.125)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a call to be made under `recording`)."""
    for case in _listed():
        yield case.name, partial(_tile, case)
        if case.decay != "diagonal" and case.key_dim >= 128:
            yield f"both ends, {case.name}", partial(_both, case)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): every block, dtype and flag; ahead.py compiles what `cases` do not cover."""
    for case in _varied():
        yield case.name, partial(_tile, case)
        if case.decay != "diagonal":
            yield f"both ends, {case.name}", partial(_both, case)


def _varied() -> Iterator[Case]:
    # Other dims lie within squares of as many stages, but for these on sm_80.
    narrow = ((128, 32), (32, 128), (256, 16), (16, 256))
    for dims in [*((side, side) for side in (256, 128, 64, 32, 16)), *narrow]:
        for decay, dtype in product(("diagonal", "scalar", "none"), (BF16, FP32)):
            yield Case(decay, *dims, dtype)
    for decay, dims in product(("diagonal", "scalar"), ((33, 47), (47, 33), (80, 144), (144, 80))):
        yield Case(decay, *dims, BF16)
    flags = product(("diagonal", "scalar", "none"), (FP32, BF16), (True, False), (True, False))
    for decay, dtype, packed, lone in flags:
        for of_decay in (FP32, BF16):
            yield Case(decay, 32, 32, dtype, packed=packed, lone=lone, of_decay=of_decay)
