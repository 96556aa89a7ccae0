"""Calls that start every kernel of the delta rule with the dims, dtypes and options to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from xdist_kernels.delta import triton as delta

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("none", "scalar", "diagonal")
TOKENS = 1000


class Case(NamedTuple):
    """A tile: decays, dtype, dims, heads, whether documents start inside, precision of float32."""

    kind: str
    dtype: str = "bf16"
    dims: tuple[int, int] = (128, 128)
    heads: int = 16
    starts: bool = False
    precision: str = "ieee"

    @property
    def name(self) -> str:
        marked = " documents" if self.starts else ""
        return (
            f"{self.kind} {self.dtype} K{self.dims[0]} V{self.dims[1]} H{self.heads}{marked} "
            f"{self.precision}"
        )


def _tile(case: Case) -> tuple[delta.Tile, torch.Tensor]:
    def made(*dims: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*dims, dtype=dtype, device="meta")

    tokens, (key_dim, width) = (1, TOKENS, case.heads), case.dims
    keys = made(*tokens, key_dim, dtype=DTYPES[case.dtype])
    values = made(*tokens, width, dtype=DTYPES[case.dtype])
    decays = {"none": None, "scalar": made(*tokens), "diagonal": made(*tokens, key_dim)}
    marks = made(TOKENS, dtype=torch.bool) if case.starts else None
    tile = delta.prepare(
        keys,
        keys,
        values,
        made(*tokens),
        decays[case.kind],
        key_dim**-0.5,
        marks,
        precision=case.precision,
    )
    return tile, made(1, case.heads, key_dim, width)


def _alone(case: Case) -> None:
    """On one rank: outputs, and gradients in the inputs' dtype."""
    tile, state = _tile(case)
    delta.run(tile, state)
    delta.backward(tile, state, tile.inputs.v, state, narrow=True)


def _waiting(case: Case) -> None:
    """Where the gradient of the state has to arrive first; gradients in float32."""
    tile, state = _tile(case)
    delta.backward(delta.backward_ahead(tile, state, tile.inputs.v), state, tile.inputs.v, state)


def _summary(case: Case) -> None:
    """What other segments need."""
    tile, state = _tile(case)
    delta.transition(tile)
    delta.advance(tile, state)
    delta.adjoint(tile, tile.inputs.v, state)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): decays, dtypes, head dims, few and many heads, documents, precisions."""
    alone = [Case(kind) for kind in KINDS]
    for kind in KINDS[1:]:
        alone += [Case(kind, heads=512), Case(kind, "fp32"), Case(kind, dims=(256, 256))]
    alone += [Case(kind, starts=True) for kind in KINDS]
    alone += [
        Case("scalar", dims=(64, 64)),
        Case("none", dims=(96, 80)),
        Case("scalar", "fp16"),
        Case("scalar", "fp32", (64, 64)),
        Case("scalar", "fp32", (256, 256)),
    ]
    for case in alone:
        yield case.name, partial(_alone, case)
    for kind in KINDS:
        yield f"{Case(kind).name} waiting", partial(_waiting, Case(kind))
        yield f"{Case(kind).name} summary", partial(_summary, Case(kind))
    fast = Case("scalar", precision="tf32x3")
    yield f"{fast.name} summary", partial(_summary, fast)
    yield f"{fast.name} fp32", partial(_alone, fast._replace(dtype="fp32"))


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call); ahead.py compiles what `cases` do not cover."""
    case = Case("diagonal", dims=(32, 32))
    yield case.name, partial(_alone, case)
    yield f"{case.name} waiting", partial(_waiting, case)
    yield f"{case.name} summary", partial(_summary, case)
