"""Calls that start every kernel of the delta rule with the dims, dtypes and options to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from xdist_kernels.delta import triton as delta

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("none", "scalar", "diagonal")
TOKENS = 1000
Call = tuple[str, Callable[[], object]]


class Case(NamedTuple):
    """A tile: decays, dtype, dims, heads, whether documents start inside, precision of float32;
    group: value heads that share a key head; gates, beta: dtypes of log decays and of beta."""

    kind: str
    dtype: str = "bf16"
    dims: tuple[int, int] = (128, 128)
    heads: int = 16
    starts: bool = False
    precision: str = "ieee"
    group: int = 1
    gates: str = "fp32"
    beta: str = "fp32"

    @property
    def name(self) -> str:
        flags = [
            *(["documents"] if self.starts else []),
            *(["shared"] if self.group > 1 else []),
            *([f"gates {self.gates}"] if self.gates != "fp32" else []),
            *([f"beta {self.beta}"] if self.beta != "fp32" else []),
        ]
        size = f"K{self.dims[0]} V{self.dims[1]} H{self.heads}"
        return " ".join([self.kind, self.dtype, size, *flags, self.precision])


def _tile(case: Case) -> tuple[delta.Tile, torch.Tensor]:
    def made(*dims: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*dims, dtype=dtype, device="meta")

    tokens, (key_dim, width) = (1, TOKENS, case.heads), case.dims
    keys = made(1, TOKENS, case.heads // case.group, key_dim, dtype=DTYPES[case.dtype])
    values, gates = made(*tokens, width, dtype=DTYPES[case.dtype]), DTYPES[case.gates]
    decays = {
        "none": None,
        "scalar": made(*tokens, dtype=gates),
        "diagonal": made(*tokens, key_dim, dtype=gates),
    }
    marks = made(TOKENS, dtype=torch.bool) if case.starts else None
    tile = delta.prepare(
        keys,
        keys,
        values,
        made(*tokens, dtype=DTYPES[case.beta]),
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
    if not case.starts:
        delta.transition(tile)
    delta.advance(tile, state)
    delta.adjoint(tile, tile.inputs.v, state)


def cases() -> Iterator[Call]:
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


def variants() -> Iterator[Call]:
    """(name, call): every block, dtype and option; ahead.py compiles what `cases` do not cover."""
    for case in _varied():
        yield case.name, partial(_alone, case)
        yield f"{case.name} waiting", partial(_waiting, case)
        yield f"{case.name} summary", partial(_summary, case)


def _varied() -> Iterator[Case]:
    types = (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32x3"), ("bf16", "tf32x3"))
    sides = (256, 16, 32, 64, 128)
    # Each size meets each kind of decay and each dtype; not at once where it can be avoided.
    for turn in range(len(KINDS)):
        for (i, side), (j, (dtype, precision)) in product(enumerate(sides), enumerate(types)):
            kind = KINDS[(i + j + turn) % len(KINDS)]
            yield Case(kind, dtype, (side, side), precision=precision)
    for kind, dims in product(KINDS, ((256, 64), (256, 32), (256, 16), (128, 64), (128, 32))):
        for dtype, precision in types:
            yield Case(kind, dtype, dims, precision=precision)
    for kind, side in product(KINDS, (128, 64)):
        yield Case(kind, dims=(side, side), heads=512)
    for dims in ((33, 47), (80, 48), (48, 80)):
        yield Case("scalar", dims=dims)
    either = ("bf16", "fp32")
    mixed = list(product(KINDS, either, (True, False), (2, 1), either, either))
    # In steps that change all of them: any two meet sooner than one after the other.
    for i in range(len(mixed)):
        kind, dtype, starts, group, *gates = mixed[i * 41 % len(mixed)]
        yield Case(kind, dtype, (16, 16), 16, starts, "ieee", group, *gates)
