"""Law 1, bytes, leaks and bad input of xdist.selective_scan."""

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
    grid,
)
from xdist.cost.recurrent import Problem, recurrent_bytes
from xdist.documents import Documents
from xdist.errors import NumericsError, ShapeError, StrategyError
from xdist.testing import RankPool, layouts
from xdist_kernels.selective_scan.reference import selective_scan_reference

BATCH, CHANNELS, STATES = 2, 5, 3


def draw(variant: str, generator: torch.Generator) -> Inputs:
    """Decays near 1, so that what crosses the ranks matters; "local" has bias, skip and gate."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    found = {
        "u": normal(BATCH, N, CHANNELS),
        "delta": 0.02 + 0.1 * uniform(BATCH, N, CHANNELS),
        "A": -uniform(CHANNELS, STATES),
        "B": normal(BATCH, N, STATES),
        "C": normal(BATCH, N, STATES),
    }
    if variant == "local":
        found["delta_bias"] = 0.02 * uniform(CHANNELS)
        found["D"], found["z"] = normal(CHANNELS), normal(BATCH, N, CHANNELS)
    return found


def reference(
    inputs: Inputs, initial: Tensor | None, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    given = dict(inputs)
    D, z, bias = (given.pop(name, None) for name in ("D", "z", "delta_bias"))
    if bias is not None:
        given["delta"] = given["delta"] + bias
    out, final = selective_scan_reference(**given, initial_state=initial, cu_seqlens=cuts)
    out = out if D is None else out + D * given["u"]
    return out if z is None else out * torch.nn.functional.silu(z), final


OP = Op(
    "selective_scan", draw, reference, state=(BATCH, CHANNELS, STATES), whole=("A",),
    variants=("", "local"), like="u",
)  # fmt: skip


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
    check_law_1(OP, part_of(grid(OP, 3, dtype, each=1)), pool3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_four_ranks(dtype: torch.dtype, pool4: RankPool) -> None:
    """Five channels on four ranks under switch: uneven shares."""
    check_law_1(OP, part_of(grid(OP, 4, dtype, each=1)), pool4)


@pytest.mark.slow
def test_law_1_in_bfloat16_and_on_more_layouts(pool3: RankPool, pool4: RankPool) -> None:
    check_law_1_in_bfloat16(OP, pool3, 3)
    check_law_1(OP, grid(OP, 4, torch.float64, seeds=3), pool4)


def test_ledger_is_the_formula_is_the_second_count(pool2: RankPool, pool3: RankPool) -> None:
    pool2.run(count_bytes, OP, grid(OP, 2, torch.float64, each=1))
    pool3.run(count_bytes, OP, grid(OP, 3, torch.float32, each=1))


def test_scan_bytes_are_those_of_states_and_one_number_a_channel() -> None:
    """They do not grow with the sequence, and a transition is C numbers, not C x N."""

    def sent(n: int, transition: str) -> int:
        """64 channels x 16 states on four ranks, gathered: what the second rank sends."""
        layout, documents = xdist.Layout.zigzag(n, 4), Documents.of(None, n)
        problem = Problem(layout, documents, 1, 64, 16, 1, 1, transition, 4, (), algorithm="gather")
        return recurrent_bytes(problem, "scan", 1, backward=False).sent_bytes

    assert sent(1 << 20, "scalar") == sent(1 << 10, "scalar")
    assert sent(1 << 10, "diagonal") - sent(1 << 10, "scalar") >= 4 * 64 * 15


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


@pytest.mark.parametrize("algorithm", [name for _, name in WAYS[1:4]])
def test_local_work_runs_while_states_travel(algorithm: str, pool2: RankPool) -> None:
    check_overlap(OP, pool2, algorithm)


def largest_tensor(n: int) -> int:
    """Elements of the largest tensor made on this rank, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if torch.is_tensor(x)]
            self.seen = max([self.seen, *sizes])
            return out

    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(n, 2))
    u = torch.randn(1, n // 2, 64, requires_grad=True)
    B = torch.randn(1, n // 2, 4)
    with Largest() as largest:
        y = xdist.selective_scan(
            u, u.detach().abs(), -torch.rand(64, 4), B, B, shard, strategy="scan"
        )
        y.sum().backward()
    return largest.seen


def test_scan_never_holds_the_sequence(pool2: RankPool) -> None:
    """Nothing larger than this rank's own share is made, or a block of states: a scan that
    gathered the sequence, or made [T, C, N], would be seen."""
    n = 1 << 15
    share = 4 * 64 * n // 2
    for largest in pool2.run(largest_tensor, n):
        assert largest <= share


# --- bad input ----------------------------------------------------------------------------------


def given(n: int = 4) -> dict[str, Tensor]:
    return {
        "u": torch.ones(1, n, 3),
        "delta": torch.ones(1, n, 3),
        "A": -torch.ones(3, 2),
        "B": torch.ones(1, n, 2),
        "C": torch.ones(1, n, 2),
    }


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("delta", torch.ones(1, 4, 2), r"delta must be \[B,n,C\] = \[1, 4, 3\].*got \[1, 4, 2\]"),
        ("A", -torch.ones(2, 2), r"A must be \[C,N\] = \[3, 2\].*got \[2, 2\]"),
        ("B", torch.ones(1, 4, 3), r"B must be \[B,n,N\] = \[1, 4, 2\].*got \[1, 4, 3\]"),
        ("z", torch.ones(1, 3, 3), r"z must be \[B,n,C\] = \[1, 4, 3\].*got \[1, 3, 3\]"),
        ("D", torch.ones(4), r"D must be \[C\] = \[3\].*got \[4\]"),
        ("delta_bias", torch.ones(1), r"delta_bias must be \[C\] = \[3\].*got \[1\]"),
        ("initial_state", torch.ones(1, 2, 3), r"\[B, C, N\] = \[1, 3, 2\].*got \[1, 2, 3\]"),
        ("u", torch.ones(4, 3), r"u must be \[B,n,C\] and A \[C,N\].*got \(4, 3\)"),
        ("C", torch.ones(1, 4, 2, dtype=torch.int64), "floating point"),
    ],
)
def test_wrong_shapes_say_what_was_needed_and_what_was_got(
    name: str, wrong: Tensor, said: str
) -> None:
    with pytest.raises(ShapeError, match=f"(?s){said}"):
        xdist.selective_scan(**{**given(), name: wrong})


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(StrategyError, match="no strategy 'ring'"):
        xdist.selective_scan(**given(), strategy="ring")


def bad_values() -> list[str]:
    """What one rank's bad value makes every rank raise; and without checks nothing is raised."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(8, 2), [0, 3, 8])
    said = []
    state = torch.zeros(1, 2, 3, 2)
    for name, value in (
        ("delta", -0.5),
        ("A", 0.25),
        ("u", torch.nan),
        ("initial_state", torch.nan),
    ):
        inputs = {**given(), "initial_state": state.clone()}
        if mesh.sequence_rank == 1:
            inputs[name].view(-1)[0] = value
        with xdist.checks():
            try:
                xdist.selective_scan(**inputs, shard=shard)
            except NumericsError as error:
                said.append(str(error))
        assert xdist.selective_scan(**inputs, shard=shard).shape == (1, 4, 3)
    return said


def test_bad_values_are_one_error_on_all_ranks(pool2: RankPool) -> None:
    first, second = pool2.run(bad_values)
    assert len(first) == len(second) == 4
    for one in (*first, *second):
        assert "sequence ranks [1] hold others" in one
    assert "least_delta -0.5" in second[0]
    assert "highest_A 0.25" in second[1]
    assert "not finite" in second[2]
    assert "not finite" in second[3]


def test_bias_and_softplus_make_delta() -> None:
    """In float32 also for bfloat16, where softplus would round small steps away."""
    torch.manual_seed(0)
    inputs = {name: torch.randn_like(x) for name, x in given(20).items()}
    inputs["A"] = -inputs["A"].abs()
    bias = torch.randn(3) - 4.0
    for dtype in (torch.float64, torch.bfloat16):
        x = {name: t.to(dtype) for name, t in inputs.items()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        got = xdist.selective_scan(**x, delta_bias=bias.to(dtype).to(wide), delta_softplus=True)
        delta = torch.nn.functional.softplus(x["delta"].to(wide) + bias.to(dtype).to(wide))
        assert torch.equal(got, xdist.selective_scan(**{**x, "delta": delta}))
        assert got.dtype == dtype


def test_a_softplus_of_a_negative_delta_is_no_error() -> None:
    inputs = given()
    inputs["delta"] -= 5.0
    with xdist.checks():
        xdist.selective_scan(**inputs, delta_softplus=True, delta_bias=torch.full((3,), -1.0))
        with pytest.raises(NumericsError, match=r"delta \(after bias and softplus\) at least 0"):
            xdist.selective_scan(**inputs)
