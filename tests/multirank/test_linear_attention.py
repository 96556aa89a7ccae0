"""Law 1 for xdist.linear_attention: any layout, documents, decay and strategy equals one device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.multirank.recurrence_cases import (
    Inputs,
    Op,
    check_law_1,
    check_law_1_in_bfloat16,
    grid,
)
from xdist.testing import RankPool
from xdist_kernels.linear.reference import linear_attention_reference

BATCH, HEADS, KEY_DIM, WIDTH = 2, 4, 3, 2
N = 37
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def draw(variant: str, generator: torch.Generator) -> Inputs:
    """variant: none, fixed, scalar or diagonal decay, and how many value heads share a key head."""
    kind, shared = variant.split("/")
    keys = HEADS // int(shared)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, N, *shape, generator=generator, dtype=torch.float64)

    found = {"q": normal(keys, KEY_DIM), "k": normal(keys, KEY_DIM), "v": normal(HEADS, WIDTH)}
    shapes = {
        "fixed": (HEADS,),
        "scalar": (BATCH, N, HEADS),
        "diagonal": (BATCH, N, HEADS, KEY_DIM),
    }
    if kind != "none":
        # Gates near 1: what crosses the ranks then matters to the last token.
        drawn = torch.rand(shapes[kind], generator=generator, dtype=torch.float64)
        found["log_decay"] = -0.02 * drawn
    return found


def reference(
    inputs: Inputs, initial: Tensor | None, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    return linear_attention_reference(**inputs, initial_state=initial, cu_seqlens=cuts)


OP = Op(
    "linear_attention",
    draw,
    reference,
    (BATCH, HEADS, KEY_DIM, WIDTH),
    variants=("none/2", "fixed/1", "scalar/1", "scalar/4", "diagonal/2"),
)


def check(parts: int, dtype: torch.dtype, pool: RankPool | None) -> None:
    each = 2 if dtype == torch.float64 else 1
    check_law_1(OP, grid(OP, parts, dtype, each=each), pool)


@DTYPES
def test_law_1_on_one_rank(dtype: torch.dtype) -> None:
    check(1, dtype, None)


@DTYPES
def test_law_1_on_two_ranks(dtype: torch.dtype, pool2: RankPool) -> None:
    check(2, dtype, pool2)


@DTYPES
def test_law_1_on_three_ranks(dtype: torch.dtype, pool3: RankPool) -> None:
    check(3, dtype, pool3)


@DTYPES
def test_law_1_on_four_ranks(dtype: torch.dtype, pool4: RankPool) -> None:
    check(4, dtype, pool4)


def test_law_1_in_bfloat16(pool3: RankPool) -> None:
    check_law_1_in_bfloat16(OP, pool3, 3, (("scan", "auto"), ("switch", "auto")))


@pytest.mark.slow
@DTYPES
def test_law_1_on_eight_ranks_and_more_layouts(
    dtype: torch.dtype, pool4: RankPool, pool8: RankPool
) -> None:
    check_law_1(OP, grid(OP, 4, dtype, seeds=4, each=3), pool4)
    check_law_1(OP, grid(OP, 8, dtype, each=3), pool8)
