"""Calls that start every kernel of the delta rule in every configuration, for ahead.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from xdist_kernels.delta import triton as delta

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _everything(tile: delta.Tile, state: Tensor, *, summary: bool) -> None:
    if summary:
        delta.transition(tile)
        delta.advance(tile, state)
        delta.adjoint(tile, tile.inputs.v, state)
        return
    delta.run(tile, state)
    delta.backward(tile, state, tile.inputs.v, state, narrow=True)
    if tile.inputs.v.dtype != torch.float32:
        delta.backward(tile, state, tile.inputs.v, state)


def _tile(
    heads: int, dims: tuple[int, int], dtype: torch.dtype, decay: str, starts: bool, precision: str
) -> tuple[delta.Tile, Tensor]:
    key_dim, width = dims
    shape = (1, 1000, heads)
    keys = torch.empty(*shape, key_dim, dtype=dtype, device="meta")
    values = torch.empty(*shape, width, dtype=dtype, device="meta")
    beta = torch.empty(shape, device="meta")
    decays = {
        "none": None,
        "scalar": torch.empty(shape, device="meta"),
        "diagonal": torch.empty(*shape, key_dim, device="meta"),
    }
    marks = torch.empty(1000, dtype=torch.bool, device="meta") if starts else None
    tile = delta.prepare(
        keys, keys, values, beta, decays[decay], key_dim**-0.5, marks, precision=precision
    )
    return tile, torch.empty(1, heads, key_dim, width, device="meta")


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): head dims, dtypes, decays, documents, few and many heads, both precisions."""
    sizes = [(16, (64, 64)), (16, (128, 128)), (512, (128, 128)), (16, (256, 256))]
    for (heads, dims), decay in product(sizes, ("none", "scalar", "diagonal")):
        for name, dtype in DTYPES.items():
            # Heads change the blocks of narrow operands alone; float32 is compiled at one number.
            if (heads == 512 and name != "bf16") or (name == "fp16" and dims != (128, 128)):
                continue
            made = partial(_tile, heads, dims, dtype, decay, False, "ieee")
            case = f"{decay} K{dims[0]} H{heads} {name}"
            yield case, partial(_call, made, False)
            if name == "bf16" and heads == 16:
                yield f"{case} summary", partial(_call, made, True)
                made = partial(_tile, heads, dims, dtype, decay, False, "tf32x3")
                yield f"{case} summary tf32x3", partial(_call, made, True)
    for decay in ("none", "scalar", "diagonal"):
        for dims in ((64, 128), (96, 80), (16, 16)):
            made = partial(_tile, 16, dims, torch.bfloat16, decay, True, "ieee")
            case = f"{decay} K{dims[0]} V{dims[1]} bf16 documents"
            yield case, partial(_call, made, False)
            yield f"{case} summary", partial(_call, made, True)


def _call(made: Callable[[], tuple[delta.Tile, Tensor]], summary: bool) -> None:
    tile, state = made()
    _everything(tile, state, summary=summary)
