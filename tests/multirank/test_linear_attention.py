"""Law 1 for xdist.linear_attention: any layout, documents, decay and strategy equals one device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import median

import pytest
import torch
from torch import Tensor

import xdist
from xdist.testing import RankPool, layouts, relative_error
from xdist_kernels.linear.reference import linear_attention_reference

DECAYS = ("none", "fixed", "scalar", "diagonal")
N = 37
PACKED = (0, 0, 3, 4, 4, 17, 30, N)
WHOLE = {"initial_state"}  # held whole on every rank: the sum over ranks is the gradient


@dataclass(frozen=True)
class Case:
    """One call. `states`: an initial state is given and the final one used in the loss."""

    decay: str
    strategy: str
    layout: tuple
    packed: bool
    states: bool
    shared: int
    dtype: torch.dtype
    seed: int = 0

    @property
    def documents(self) -> tuple[int, ...] | None:
        return PACKED if self.packed else None

    @property
    def whole(self) -> set[str]:
        return WHOLE | ({"log_decay"} if self.decay == "fixed" else set())

    @property
    def problem(self) -> tuple:
        return self.decay, self.packed, self.states, self.shared, self.dtype, self.seed


def draw(case: Case) -> dict[str, Tensor]:
    """Whole inputs and output gradients in float64, with values that the case's dtype holds."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, heads, key_dim, width = 2, 4, 3, 2
    n = N
    found = {
        "q": normal(batch, n, heads // case.shared, key_dim),
        "k": normal(batch, n, heads // case.shared, key_dim),
        "v": normal(batch, n, heads, width),
    }
    shapes = {
        "fixed": (heads,),
        "scalar": (batch, n, heads),
        "diagonal": (batch, n, heads, key_dim),
    }
    if case.decay != "none":
        # Gates near 1: what crosses the ranks then matters to the last token.
        shape = shapes[case.decay]
        found["log_decay"] = -0.02 * torch.rand(shape, generator=generator, dtype=torch.float64)
    count = (len(PACKED) - 1,) if case.packed else ()
    if case.states:
        found["initial_state"] = normal(batch, *count, heads, key_dim, width)
    found["dout"] = normal(batch, n, heads, width)
    found["dfinal"] = normal(batch, *count, heads, key_dim, width)
    return {name: x.to(case.dtype).double() for name, x in found.items()}


def results(case: Case, shard: xdist.SequenceShard | None) -> dict[str, Tensor]:
    """Outputs and gradients of this rank for the loss <out, dout> + <final, dfinal> / ranks."""
    drawn = {name: x.to(case.dtype) for name, x in draw(case).items()}
    ranks = 1
    if shard is not None:
        ranks = shard.layout.parts
        for name in set(drawn) - case.whole - {"dfinal"}:
            drawn[name] = drawn[name][:, shard.positions]
    dout, dfinal = drawn.pop("dout"), drawn.pop("dfinal")
    leaves = {name: x.requires_grad_() for name, x in drawn.items()}
    given = dict(leaves)
    out = xdist.linear_attention(
        given.pop("q"),
        given.pop("k"),
        given.pop("v"),
        shard,
        **given,
        output_final_state=case.states,
        strategy=case.strategy,
    )
    final = None
    if case.states:
        out, final = out
    loss = (out * dout).sum()
    if final is not None:
        loss = loss + (final * dfinal).sum() / ranks
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"out": out.detach(), **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}
    if final is not None:
        found["final"] = final.detach()
    return found


def run_cases(cases: list[Case]) -> list[dict[str, Tensor]]:
    """On one rank: every case in turn."""
    found = []
    for case in cases:
        mesh = xdist.init_mesh(ring=len(case.layout))
        layout = xdist.Layout.from_segments(N, case.layout)
        found.append(results(case, xdist.SequenceShard(mesh, layout, case.documents)))
    return found


@cache
def reference(problem: tuple) -> dict[str, Tensor]:
    """The token loop in float64, and the size of what is summed for tensors held whole."""
    decay, packed, states, shared, dtype, seed = problem
    case = Case(decay, "scan", (), packed, states, shared, dtype, seed)
    drawn = draw(case)
    dout, dfinal = drawn.pop("dout"), drawn.pop("dfinal")
    leaves = {name: x.requires_grad_() for name, x in drawn.items()}
    out, final = linear_attention_reference(**leaves, cu_seqlens=case.documents)
    loss = (out * dout).sum() + ((final * dfinal).sum() if states else 0.0)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"out": out.detach(), **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}
    if states:
        found["final"] = final.detach()
    return found


@cache
def one_rank_errors(problem: tuple) -> dict[str, float]:
    """The same kernels on one rank, against the reference."""
    decay, packed, states, shared, dtype, seed = problem
    case = Case(decay, "auto", (((0, N),),), packed, states, shared, dtype, seed)
    (found,) = run_cases([case])
    return {name: relative_error(x, reference(problem)[name]) for name, x in found.items()}


def joined(case: Case, ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' results as whole tensors: tokens put back in place, parts added."""
    layout = xdist.Layout.from_segments(N, case.layout)
    found = {}
    for name, want in reference(case.problem).items():
        if name == "final":
            for one in ranks[1:]:
                assert torch.equal(one["final"], ranks[0]["final"])
            found[name] = ranks[0]["final"]
        elif name[1:] in case.whole:
            found[name] = sum(one[name].double() for one in ranks)
        else:
            whole = torch.full(want.shape, torch.nan, dtype=torch.float64)
            for rank, one in enumerate(ranks):
                whole[:, layout.positions(rank)] = one[name].double()
            found[name] = whole
    return found


def check(cases: list[Case], pool: RankPool | None) -> None:
    ranks = [run_cases(cases)] if pool is None else pool.run(run_cases, cases)
    for number, case in enumerate(cases):
        found = joined(case, [one[number] for one in ranks])
        for name, x in found.items():
            error = relative_error(x, reference(case.problem)[name])
            bound = 1e-10
            if case.dtype == torch.float32:
                bound = max(2e-6, 1.5 * one_rank_errors(case.problem)[name])
            assert error <= bound, f"{name} is off by {error:.1e} > {bound:.1e} in {case}"


def grid(parts: int, dtype: torch.dtype, seeds: int = 1) -> list[Case]:
    """Every decay, strategy and kind of layout, with and without documents; states and shared
    key heads in turn."""
    kinds = [
        (name, tuple(tuple(layout.segments(r)) for r in range(parts)))
        for seed in range(seeds)
        for name, layout in layouts(N, parts, seed).items()
    ]
    cases = []
    turns = product(kinds, DECAYS, ("scan", "switch"), (False, True))
    for number, ((_, segments), decay, strategy, packed) in enumerate(turns):
        turn = number // 2 + number % 2
        states, shared = turn % 3 != 0, 1 + turn % 2
        cases.append(Case(decay, strategy, segments, packed, states, shared, dtype))
    return cases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_one_rank(dtype: torch.dtype) -> None:
    check(grid(1, dtype), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_two_ranks(dtype: torch.dtype, pool2: RankPool) -> None:
    check(grid(2, dtype), pool2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_three_ranks(dtype: torch.dtype, pool3: RankPool) -> None:
    check(grid(3, dtype), pool3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_four_ranks(dtype: torch.dtype, pool4: RankPool) -> None:
    check(grid(4, dtype), pool4)


def test_law_1_in_bfloat16(pool3: RankPool) -> None:
    """Three ranks, zigzag: medians over five seeds stay within 1.5 times those of one rank."""
    layout = layouts(N, 3)["zigzag"]
    segments = tuple(tuple(layout.segments(r)) for r in range(3))
    cases = [
        Case(decay, strategy, segments, True, True, 2, torch.bfloat16, seed)
        for decay, strategy in product(DECAYS, ("scan", "switch"))
        for seed in range(5)
    ]
    ranks = pool3.run(run_cases, cases)
    for first in range(0, len(cases), 5):
        errors: dict[str, list[float]] = {}
        alone: dict[str, list[float]] = {}
        for number in range(first, first + 5):
            case = cases[number]
            found = joined(case, [one[number] for one in ranks])
            for name, x in found.items():
                error = relative_error(x, reference(case.problem)[name])
                errors.setdefault(name, []).append(error)
                alone.setdefault(name, []).append(one_rank_errors(case.problem)[name])
        for name in errors:
            bound = max(2e-6, 1.5 * median(alone[name]))
            assert median(errors[name]) <= bound, (name, cases[first])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_on_eight_ranks_and_more_layouts(dtype: torch.dtype, pool4: RankPool) -> None:
    check(grid(4, dtype, seeds=4), pool4)
    with RankPool(8) as pool8:
        check(grid(8, dtype), pool8)
