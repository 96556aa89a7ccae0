"""Calls that start every kernel of attention with the dims, dtypes and options to compile.

Tensors are on the meta device: under `launch.recording` nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from xdist_kernels.attention import triton as door
from xdist_kernels.attention.dropout import Dropped

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_WIDTHS = ((32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
_SOME = ((64, 64), (128, 128), (256, 256))
_TOKENS, _HEADS = 4096, 8


class Case(NamedTuple):
    """made: dtype of results, float32 where None; groups: key heads."""

    dtype: torch.dtype
    dim: int
    value_dim: int
    softcap: bool = False
    dropout: bool = False
    into: bool = False
    sinks: torch.dtype | None = None
    made: torch.dtype | None = None
    precision: str = "ieee"
    groups: int = 2

    @property
    def name(self) -> str:
        flags = {"softcap": self.softcap, "dropout": self.dropout, "into": self.into}
        names = [name for name, on in flags.items() if on]
        if self.sinks is not None:
            names.append("sinks" if self.sinks == FP32 else f"{_short(self.sinks)} sinks")
        if self.made is not None:
            names.append("narrow" if self.made == self.dtype else f"to {_short(self.made)}")
        if self.precision != "ieee":
            names.append(self.precision)
        if self.groups == _HEADS:
            names.append("own heads")
        return " ".join([_short(self.dtype), f"{self.dim}/{self.value_dim}", *names])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed() -> Iterator[Case]:
    for dtype, widths in ((BF16, _WIDTHS), (FP16, _SOME), (FP32, _SOME)):
        for dims in widths:
            yield Case(dtype, *dims)
    for dim in (64, 128):
        yield Case(FP32, dim, dim, precision="tf32x3")
    wide = Case(BF16, 128, 128)
    yield wide._replace(softcap=True)
    yield wide._replace(dropout=True)
    yield wide._replace(into=True)
    yield wide._replace(sinks=FP32)
    yield wide._replace(into=True, sinks=FP32)
    whole = wide._replace(softcap=True, dropout=True, into=True, sinks=FP32)
    yield whole
    yield whole._replace(dim=256, value_dim=256)
    yield whole._replace(dtype=FP32)
    yield wide._replace(made=BF16)
    # Dims that differ, the wider one of either kind.
    yield Case(BF16, 64, 128)
    yield Case(BF16, 128, 256)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a forward and backward call): head dims, dtypes, options."""
    yield from map(_one, _listed())


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): every block and option; ahead.py compiles what `cases` do not cover."""
    for dtype, precision in ((BF16, "ieee"), (FP32, "ieee"), (FP32, "tf32x3")):
        for dims in ((256, 256), (128, 128), (64, 64), (32, 32), (16, 16), (33, 47)):
            yield _one(Case(dtype, *dims, precision=precision))
    flags = product((True, False), (True, False), (True, False), (FP32, BF16, None), (BF16, None))
    mixed = list(product((BF16, FP32), flags))
    # In steps that change all of them: any two meet sooner than one after the other.
    for i in range(len(mixed)):
        dtype, (softcap, dropout, into, sinks, made) = mixed[i * 41 % len(mixed)]
        case = Case(dtype, 32, 32, softcap, dropout, into, sinks, None if into else made)
        yield _one(case._replace(groups=_HEADS if made else 2))


def _one(case: Case) -> tuple[str, Callable[[], object]]:
    return case.name, partial(_call, case)


def _call(case: Case) -> None:
    n, heads = _TOKENS, _HEADS
    q, k, v, dout = (
        torch.empty(1, n, h, d, dtype=case.dtype, device="meta")
        for h, d in (
            (heads, case.dim), (case.groups, case.dim),
            (case.groups, case.value_dim), (heads, case.value_dim),
        )
    )  # fmt: skip
    at = torch.empty(n, dtype=torch.int64, device="meta")
    dropped = Dropped(0.1, 1, 0, 0, at) if case.dropout else None
    sinks = None
    if case.sinks is not None:
        sinks = torch.empty(heads, dtype=case.sinks, device="meta")
    part = None
    if case.into:
        part = (
            torch.empty(1, n, heads, case.value_dim, device="meta"),
            torch.empty(1, n, heads, device="meta"),
        )
    plans = door.Plans((at, at, at, at), at)
    cap = 30.0 if case.softcap else None
    out, lse = door.attention_forward(
        q, k, v, scale=1.0, spans=(at, at, at, at), k_positions=at, softcap=cap, sinks=sinks,
        dropout=dropped, into=part, plans=plans, dtype=case.made, precision=case.precision,
    )  # fmt: skip
    door.attention_backward(
        q, k, v, lse, door.attention_delta(out, dout), dout, scale=1.0, spans=(at, at, at, at),
        k_positions=at, softcap=cap, dropout=dropped, plans=plans, dtype=case.made,
        precision=case.precision,
    )  # fmt: skip
