"""Law 1, bytes, leaks and bad input of xdist.prefix_attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank import recurrence_cases as cases_of
from tests.multirank.recurrence_cases import (
    WAYS,
    Case,
    Inputs,
    N,
    Op,
    check_law_1,
    check_law_1_in_bfloat16,
    check_overlap,
    count_bytes,
)
from xdist.errors import NumericsError, ShapeError, StrategyError
from xdist.testing import RankPool, layouts
from xdist_kernels.prefix.reference import prefix_attention_reference

BATCH, HEADS, KEY_DIM, WIDTH = 2, 3, 4, 2


def draw(variant: str, generator: torch.Generator) -> Inputs:
    """ "large": scores of thousands, of which a few differ by less than one."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {
        "q": normal(HEADS, KEY_DIM),
        "k": normal(BATCH, N, HEADS, KEY_DIM),
        "v": normal(BATCH, N, HEADS, WIDTH),
    }
    if variant == "large":
        # The first key dim alone makes the size: 8192 is the same number in every dtype.
        found["q"][:, 0], found["k"][..., 0] = 2.0, 8192.0
    return found


def reference(
    inputs: Inputs, initial: Tensor | None, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    out = prefix_attention_reference(**inputs, scale=KEY_DIM**-0.5, cu_seqlens=cuts)
    return out, torch.zeros(BATCH, len(cuts) - 1, 1)


OP = Op(
    "prefix_attention", draw, reference, state=(BATCH, HEADS, 1, 2 + WIDTH), whole=("q",),
    states=False,
)  # fmt: skip
LARGE = Op(
    "prefix_attention", draw, reference, state=(BATCH, HEADS, 1, 2 + WIDTH), whole=("q",),
    variants=("large",), states=False,
)  # fmt: skip


# The columns of a state share its exponent: they cannot travel one after another.
SERVED = tuple(way for way in WAYS if way[1] != "pipelined")


def grid(op: Op, parts: int, dtype: torch.dtype, *, seeds: int = 1) -> list[Case]:
    cases = cases_of.grid(op, parts, dtype, seeds=seeds)
    return [case for case in cases if (case.strategy, case.algorithm) in SERVED]


def part_of(cases: list[Case]) -> list[Case]:
    """All in float64, every third one in float32."""
    return [c for number, c in enumerate(cases) if c.dtype == torch.float64 or number % 3 == 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_one_rank(dtype: torch.dtype) -> None:
    check_law_1(OP, part_of(grid(OP, 1, dtype)), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_two_ranks(dtype: torch.dtype, pool2: RankPool) -> None:
    check_law_1(OP, part_of(grid(OP, 2, dtype)), pool2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_three_ranks(dtype: torch.dtype, pool3: RankPool) -> None:
    check_law_1(OP, part_of(grid(OP, 3, dtype)), pool3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_four_ranks(dtype: torch.dtype, pool4: RankPool) -> None:
    """Three heads on four ranks under switch: one has none."""
    check_law_1(OP, part_of(grid(OP, 4, dtype)), pool4)


def test_scores_of_thousands_cross_the_ranks(pool3: RankPool) -> None:
    """Scores of 8,192: their exponentials overflow, their differences decide."""
    check_law_1(LARGE, grid(LARGE, 3, torch.float64), pool3)


@pytest.mark.slow
def test_law_1_in_bfloat16_and_on_more_layouts(pool3: RankPool, pool4: RankPool) -> None:
    check_law_1_in_bfloat16(OP, pool3, 3, SERVED)
    check_law_1(OP, grid(OP, 4, torch.float64, seeds=4), pool4)


def test_ledger_is_the_formula_is_the_second_count(pool2: RankPool, pool3: RankPool) -> None:
    pool2.run(count_bytes, OP, grid(OP, 2, torch.float64))
    pool3.run(count_bytes, OP, grid(OP, 3, torch.float32))


def test_the_state_that_crosses_matters(pool2: RankPool) -> None:
    segments = (((0, 19),), ((19, N),))
    first, second = pool2.run(cases_of.state_matters, OP, Case(segments))
    assert first == 0
    assert second > 1e-2


def test_nothing_leaks_from_later_tokens_or_other_documents(pool3: RankPool) -> None:
    drawn = layouts(N, 3, seed=2)["drawn"]
    segments = tuple(tuple(drawn.segments(r)) for r in range(3))
    for strategy in ("scan", "switch"):
        found = pool3.run(cases_of.leaks, OP, Case(segments, strategy=strategy), 20)
        assert found == [(True, True)] * 3, strategy


@pytest.mark.parametrize("algorithm", ["gather", "chain"])
def test_local_work_runs_while_states_travel(algorithm: str, pool2: RankPool) -> None:
    check_overlap(OP, pool2, algorithm)


# --- bad input ----------------------------------------------------------------------------------


def given() -> dict[str, Tensor]:
    return {"q": torch.ones(3, 2), "k": torch.ones(1, 4, 3, 2), "v": torch.ones(1, 4, 3, 5)}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("q", torch.ones(2, 2)),
        ("q", torch.ones(1, 4, 3, 2)),
        ("k", torch.ones(1, 5, 3, 2)),
        ("v", torch.ones(1, 4, 2, 5)),
        ("v", torch.ones(4, 3, 5)),
    ],
)
def test_wrong_shapes_say_what_was_got(name: str, wrong: Tensor) -> None:
    inputs = {**given(), name: wrong}
    said = (
        f"q {tuple(inputs['q'].shape)}, k {tuple(inputs['k'].shape)}, v {tuple(inputs['v'].shape)}"
    )
    with pytest.raises(ShapeError) as error:
        xdist.prefix_attention(**inputs)
    assert f"got {said}" in str(error.value)


def test_wrong_dtypes_and_strategies_are_errors() -> None:
    with pytest.raises(ShapeError, match=r"(?s)all float64 or none.*q torch.float64"):
        xdist.prefix_attention(**{**given(), "q": torch.ones(3, 2).double()})
    with pytest.raises(StrategyError, match="no strategy 'ring'"):
        xdist.prefix_attention(**given(), strategy="ring")


def pipelined() -> str:
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(8, 2))
    try:
        xdist.prefix_attention(**given(), shard=shard, algorithm="pipelined")
    except StrategyError as error:
        return str(error)
    return "nothing"


def test_a_pipeline_over_columns_is_refused_on_all_ranks(pool2: RankPool) -> None:
    for said in pool2.run(pipelined):
        assert "use 'gather', 'chain' or 'auto'" in said


def bad_values() -> str:
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(8, 2))
    inputs = given()
    if mesh.sequence_rank == 1:
        inputs["k"][0, 0, 0, 0] = torch.nan
    with xdist.checks():
        try:
            xdist.prefix_attention(**inputs, shard=shard)
        except NumericsError as error:
            return str(error)
    return "nothing"


def test_bad_values_are_one_error_on_all_ranks(pool2: RankPool) -> None:
    for said in pool2.run(bad_values):
        assert "sequence ranks [1] hold others" in said
