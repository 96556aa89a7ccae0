"""Calls that start every Triton kernel of the causal convolution, for the compiler (ahead.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from xdist_kernels.conv import triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BATCH, TOKENS, CHANNELS = 2, 4096, 1536


class Case(NamedTuple):
    """weight, bias, prefix: their dtypes, None where there is none; into: gradients are added to
    those of the history and the run in one tensor, as xdist calls it."""

    dtype: torch.dtype
    width: int
    silu: bool = True
    weight: torch.dtype = FP32
    bias: torch.dtype | None = FP32
    prefix: torch.dtype | None = None
    into: bool = False
    packed: bool = False


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): widths, dtypes, with and without bias, SiLU, prefix, documents, `into`."""
    whole = Case(BF16, 4, prefix=BF16, into=True)
    for name, dtype in {"bf16": BF16, "fp16": FP16, "fp32": FP32}.items():
        yield f"{name} W4 silu into", partial(_both, whole._replace(dtype=dtype, prefix=dtype))
    yield "bf16 W4 silu documents into", partial(_both, whole._replace(packed=True))
    yield "bf16 W4 silu", partial(_both, Case(BF16, 4))
    yield "bf16 W4 no bias", partial(_both, Case(BF16, 4, silu=False, bias=None))
    for width in (1, 2, 3, 5, 6, 7, 8):
        yield f"bf16 W{width} silu into", partial(_both, whole._replace(width=width))


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): every flag and dtype; ahead.py compiles what `cases` do not cover."""
    optional = (BF16, FP32, None)
    flags = product((True, False), (BF16, FP32), optional, optional, (True, False), (True, False))
    mixed = list(product((BF16, FP32), flags))
    # In steps that change all of them: any two meet sooner than one after the other.
    for i in range(len(mixed)):
        dtype, given = mixed[i * 107 % len(mixed)]
        yield "W2, dtypes and options", partial(_both, Case(dtype, 2, *given))


def _both(case: Case) -> None:
    """Forward and backward."""

    def new(*shape: int, kind: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    x, weight = new(BATCH, TOKENS, CHANNELS), new(CHANNELS, case.width, kind=case.weight)
    level = None if case.bias is None else new(CHANNELS, kind=case.bias)
    activation = "silu" if case.silu else None
    prefix = None
    if case.prefix is not None:
        prefix = new(BATCH, case.width - 1, CHANNELS, kind=case.prefix)
    inside = new(TOKENS, kind=torch.int64) if case.packed else None
    triton.causal_conv_forward(
        x, weight, level, activation=activation, prefix=prefix, into_document=inside
    )
    into = None
    if case.into:
        into = new(BATCH, case.width - 1 + TOKENS, CHANNELS, kind=FP32)
    triton.causal_conv_backward(
        x, weight, level, new(BATCH, TOKENS, CHANNELS), activation=activation, prefix=prefix,
        into_document=inside, into=into,
    )  # fmt: skip
