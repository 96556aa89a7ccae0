"""Calls that start every Triton kernel of the selective scan, for the compiler (ahead.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from xdist_kernels.selective_scan import triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BATCH, TOKENS, CHANNELS = 1, 8192, 1536


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call); delta is float32 behind a softplus, else in the dtype of u."""
    kinds = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32)]
    for dtype, of_delta in kinds:
        name = f"{_short(dtype)} delta {_short(of_delta)}"
        yield f"{name} N16", partial(_every_function, 16, dtype, of_delta, False)
    yield "bf16 delta fp32 N16 documents", partial(_every_function, 16, BF16, FP32, True)
    for states in (1, 256):
        yield f"bf16 delta fp32 N{states}", partial(_every_function, states, BF16, FP32, False)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): every number of states and dtype; ahead.py compiles what `cases` do not
    cover."""
    for states in (128, 64, 32, 8, 4, 2, 80, 5):
        yield f"bf16 delta fp32 N{states}", partial(_every_function, states, BF16, FP32, False)
    for dtype, of_delta, packed in product((FP32, BF16), (BF16, FP32), (True, False)):
        name = f"{_short(dtype)} delta {_short(of_delta)} N4{' documents' if packed else ''}"
        yield name, partial(_every_function, 4, dtype, of_delta, packed)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def _every_function(states: int, dtype: torch.dtype, of_delta: torch.dtype, packed: bool) -> None:
    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    by_token = (BATCH, TOKENS, CHANNELS, 1)
    p = triton.prepare(
        new(*by_token),
        new(*by_token, kind=of_delta),
        new(CHANNELS, states, kind=FP32),
        new(BATCH, TOKENS, 1, states),
        new(BATCH, TOKENS, 1, states),
        new(TOKENS, kind=torch.bool) if packed else None,
    )
    state, dout = new(BATCH, CHANNELS, states, 1, kind=FP32), new(*by_token)
    triton.advance(p, state)
    triton.run(p, state)
    triton.adjoint(p, dout, state)
    triton.backward(p, state, dout, state)
