"""Calls that start every Triton kernel of the causal convolution, for the compiler (ahead.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from xdist_kernels.conv import triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BATCH, TOKENS, CHANNELS = 2, 4096, 1536


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): widths, dtypes, with and without bias, SiLU, prefix, documents, `into`."""
    kinds = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
    for name, dtype in kinds.items():
        yield f"{name} W4 silu into", partial(_both, dtype, 4, True, True)
    yield "bf16 W4 silu documents into", partial(_both, BF16, 4, True, True, packed=True)
    yield "bf16 W4 silu", partial(_both, BF16, 4, True, False)
    yield "bf16 W4 no bias", partial(_both, BF16, 4, False, False, bias=False)
    for width in (1, 2, 3, 8):
        yield f"bf16 W{width} silu into", partial(_both, BF16, width, True, True)


def _both(
    dtype: torch.dtype,
    width: int,
    silu: bool,
    inner: bool,
    *,
    bias: bool = True,
    packed: bool = False,
) -> None:
    """Forward and backward; inner: as xdist calls them, with a prefix and gradients added up."""

    def new(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    x, weight = new(BATCH, TOKENS, CHANNELS), new(CHANNELS, width, kind=FP32)
    level = new(CHANNELS, kind=FP32) if bias else None
    activation = "silu" if silu else None
    prefix = new(BATCH, width - 1, CHANNELS) if inner else None
    inside = new(TOKENS, kind=torch.int64) if packed else None
    triton.causal_conv_forward(
        x, weight, level, activation=activation, prefix=prefix, into_document=inside
    )
    into = new(BATCH, width - 1 + TOKENS, CHANNELS, kind=FP32) if inner else None
    triton.causal_conv_backward(
        x, weight, level, new(BATCH, TOKENS, CHANNELS), activation=activation, prefix=prefix,
        into_document=inside, into=into,
    )  # fmt: skip
