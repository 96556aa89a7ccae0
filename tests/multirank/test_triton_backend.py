"""Law 1 with the Triton kernels: on a CPU in Triton's interpreter, float32, two to four ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank import attention_cases, test_conv1d
from tests.multirank.attention_cases import segments
from tests.multirank.recurrence_cases import PACKED as CUTS
from tests.multirank.recurrence_cases import (
    Case,
    Inputs,
    N,
    Op,
    check_law_1,
    errors,
    one_rank_errors,
    run_cases,
)
from xdist.errors import StrategyError
from xdist.mask import Mask
from xdist.testing import RankPool, layouts, relative_error
from xdist_kernels import backend
from xdist_kernels.delta.reference import delta_rule_reference
from xdist_kernels.linear.reference import linear_attention_reference
from xdist_kernels.linear.ssd_reference import ssd_reference
from xdist_kernels.selective_scan.reference import selective_scan_reference

BATCH, HEADS, KEY_DIM, WIDTH = 1, 2, 4, 3


@contextmanager
def on_triton() -> Iterator[list[int]]:
    """Every op on Triton kernels, or an error; [how many kernels were started]."""
    from triton.runtime.interpreter import GridExecutor

    started = [0]
    call: Any = GridExecutor.__call__

    def counted(*args: Any, **arguments: Any) -> Any:
        started[0] += 1
        return call(*args, **arguments)

    before = backend.set_default("triton")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", counted)
            yield started
    finally:
        backend.set_default(before)


def run_on(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """On one rank: how many kernels were started, and what `function` gives."""
    with on_triton() as started:
        found = function(*args)
    return started[0], found


class OnTriton:
    """A pool whose ranks run every op on Triton kernels."""

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        found = self.pool.run(run_on, function, *args)
        assert any(started for started, _ in found), "nothing was computed by Triton"
        return [result for _, result in found]


# --- attention --------------------------------------------------------------------------------


def check_attention(cases: list[attention_cases.Case], pool: RankPool) -> None:
    """Each tensor within max(2e-6, 1.5 times the error of the same kernels on one rank)."""
    answers = OnTriton(pool).run(attention_cases.run_cases, cases)
    for number, case in enumerate(cases):
        found = attention_cases.errors(case, [answer[number][0] for answer in answers])
        for name, error in found.items():
            limit = 2e-6
            if error > limit:
                one = case.on_one_rank()
                with on_triton():
                    limit = 1.5 * attention_cases.errors(one, [attention_cases.results(one)])[name]
            assert error <= limit, (name, error, limit, case)


def of_attention(strategy: str, parts: int, kind: str, mask: Mask, **rest: Any) -> Any:
    layout = segments(layouts(24, parts, seed=3)[kind])
    case = attention_cases.Case(strategy, layout, mask, 24, dtype=torch.float32, batch=1)
    return replace(case, **rest)


PACKED = (0, 1, 12, 12, 24)
PAIRS_OF_WINDOWS = Mask(causal=False, window=[(1, 1), (3, 3), *[(0, 2)] * 4])


def test_attention_on_two_ranks(pool2: RankPool) -> None:
    cases = [
        of_attention("ring", 2, "zigzag", Mask(), documents=PACKED, sinks=True),
        of_attention("halo", 2, "uneven", Mask(window=5), heads=2, groups=1),
        of_attention("ulysses", 2, "contiguous", Mask(prefix=3, window=4), heads=3, groups=3),
        # What heads 2 and 3 see was once found by the numbers of the first two heads, (0, 2).
        of_attention("ulysses", 2, "contiguous", PAIRS_OF_WINDOWS, heads=6, groups=3),
    ]
    check_attention(cases, pool2)


@pytest.mark.slow
def test_attention_on_three_and_four_ranks(pool3: RankPool, pool4: RankPool) -> None:
    check_attention(
        [
            of_attention("ring", 3, "drawn", Mask(causal=False), documents=PACKED, softcap=2.0),
            of_attention("ulysses", 3, "zigzag", Mask(), heads=4, groups=2, documents=PACKED),
            of_attention("ring", 3, "zigzag", Mask(window=[3, None, (0, 0), 30])),
            of_attention("gather", 3, "empty", Mask(chunk=7), sinks=True),
        ],
        pool3,
    )
    check_attention(
        [
            of_attention("2d", 4, "zigzag", Mask(), documents=PACKED, ulysses=2, sinks=True),
            of_attention("halo", 4, "drawn", Mask(causal=False, window=(2, 4))),
        ],
        pool4,
    )


# --- recurrences ------------------------------------------------------------------------------


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(BATCH, N, *shape, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def decay(variant: str, generator: torch.Generator) -> Inputs:
    """Near 1: what crosses the ranks then matters to the last token."""
    shapes = {
        "fixed": (HEADS,),
        "scalar": (BATCH, N, HEADS),
        "diagonal": (BATCH, N, HEADS, KEY_DIM),
    }
    if variant == "none":
        return {}
    return {"log_decay": -0.02 * uniform(generator, *shapes[variant])}


def draw_linear(variant: str, generator: torch.Generator) -> Inputs:
    """One key head for both value heads."""
    return {
        "q": normal(generator, 1, KEY_DIM),
        "k": normal(generator, 1, KEY_DIM),
        "v": normal(generator, HEADS, WIDTH),
        **decay(variant, generator),
    }


def draw_delta(variant: str, generator: torch.Generator) -> Inputs:
    k = normal(generator, HEADS, KEY_DIM)
    return {
        "q": normal(generator, HEADS, KEY_DIM),
        "k": torch.nn.functional.normalize(k, dim=-1),
        "v": normal(generator, HEADS, WIDTH),
        "beta": 0.05 + 0.15 * uniform(generator, BATCH, N, HEADS),
        **decay(variant, generator),
    }


def draw_ssd(variant: str, generator: torch.Generator) -> Inputs:
    return {
        "x": normal(generator, HEADS, WIDTH),
        "dt": 0.01 + 0.2 * uniform(generator, BATCH, N, HEADS),
        "A": -0.02 - 0.2 * uniform(generator, HEADS),
        "B": normal(generator, 1, KEY_DIM),
        "C": normal(generator, 1, KEY_DIM),
        "D": uniform(generator, HEADS),
    }


def draw_selective(variant: str, generator: torch.Generator) -> Inputs:
    return {
        "u": normal(generator, WIDTH),
        "delta": 0.02 + 0.1 * uniform(generator, BATCH, N, WIDTH),
        "A": -uniform(generator, WIDTH, KEY_DIM),
        "B": normal(generator, KEY_DIM),
        "C": normal(generator, KEY_DIM),
    }


Cuts = tuple[int, ...]


def linear_reference(inputs: Inputs, initial: Tensor | None, cuts: Cuts) -> tuple[Tensor, Tensor]:
    return linear_attention_reference(**inputs, initial_state=initial, cu_seqlens=cuts)


def delta_reference(inputs: Inputs, initial: Tensor | None, cuts: Cuts) -> tuple[Tensor, Tensor]:
    return delta_rule_reference(**inputs, initial_state=initial, cu_seqlens=cuts)


def mamba2_reference(inputs: Inputs, initial: Tensor | None, cuts: Cuts) -> tuple[Tensor, Tensor]:
    return ssd_reference(**inputs, initial_state=initial, cu_seqlens=cuts)


def mamba_reference(inputs: Inputs, initial: Tensor | None, cuts: Cuts) -> tuple[Tensor, Tensor]:
    return selective_scan_reference(**inputs, initial_state=initial, cu_seqlens=cuts)


STATE = (BATCH, HEADS, KEY_DIM, WIDTH)
LINEAR = Op("linear_attention", draw_linear, linear_reference, STATE)
DELTA = Op("delta_rule", draw_delta, delta_reference, STATE)
SSD = Op("ssd", draw_ssd, mamba2_reference, STATE, whole=("A", "D"), like="x")
SELECTIVE = Op(
    "selective_scan", draw_selective, mamba_reference, (BATCH, WIDTH, KEY_DIM),
    whole=("A",), like="u",
)  # fmt: skip


# (layout, variant, strategy, algorithm, then any of: packed, states, reverse, tiles)
Row = tuple[str, ...]


def made(parts: int, kind: str, variant: str, strategy: str, algorithm: str, *has: str) -> Case:
    """With "tiles" a rank has several, else one a segment (and one a document, where both
    documents and states are given)."""
    layout = tuple(tuple(layouts(N, parts)[kind].segments(rank)) for rank in range(parts))
    flags = ("packed" in has, "states" in has, "reverse" in has)
    tile = 12 if "tiles" in has else 64
    return Case(layout, variant, strategy, algorithm, *flags, tile, torch.float32)


def check(op: Op, pool: RankPool, parts: int, *rows: Row) -> None:
    """Each tensor within max(2e-6, 1.5 times the error of the same kernels on one rank)."""
    cases = [made(parts, *row) for row in rows]
    ranks = OnTriton(pool).run(run_cases, op, cases)
    for number, case in enumerate(cases):
        for name, error in errors(op, case, [one[number] for one in ranks]).items():
            limit = 2e-6
            if error > limit:
                with on_triton():
                    limit = 1.5 * one_rank_errors(op, case.problem)[name]
            assert error <= limit, (name, error, limit, case)


def test_linear_attention_on_two_ranks(pool2: RankPool) -> None:
    check(
        LINEAR, pool2, 2,
        ("zigzag", "scalar", "scan", "chain", "packed"),
        ("uneven", "diagonal", "scan", "gather", "states", "reverse"),
    )  # fmt: skip


def test_delta_rule_on_two_ranks(pool2: RankPool) -> None:
    check(DELTA, pool2, 2, ("zigzag", "scalar", "scan", "gather", "packed"))


def test_selective_scan_and_ssd_on_two_ranks(pool2: RankPool) -> None:
    check(SELECTIVE, pool2, 2, ("zigzag", "", "scan", "gather", "packed"))
    check(SSD, pool2, 2, ("uneven", "", "scan", "pipelined", "packed", "reverse"))


@pytest.mark.slow
def test_recurrences_on_three_and_four_ranks(pool3: RankPool, pool4: RankPool) -> None:
    check(
        LINEAR, pool4, 4,
        ("drawn", "fixed", "scan", "pipelined", "packed", "states"),
        ("contiguous", "none", "scan", "gather", "tiles"),
    )  # fmt: skip
    check(LINEAR, pool3, 3, ("uneven", "diagonal", "switch", "auto", "packed"))
    check(
        DELTA, pool3, 3,
        ("drawn", "none", "scan", "chain", "states", "reverse"),
        ("empty", "diagonal", "switch", "auto", "packed"),
    )  # fmt: skip
    check(DELTA, pool4, 4, ("uneven", "fixed", "scan", "pipelined", "packed"))
    check(
        SELECTIVE, pool4, 4,
        ("drawn", "", "scan", "chain", "states", "reverse", "tiles"),
        ("contiguous", "", "switch", "auto", "packed"),
    )  # fmt: skip
    check(SSD, pool4, 4, ("zigzag", "", "switch", "auto", "packed", "states"))


def of_both_directions(inputs: Inputs, layout: xdist.Layout | None) -> dict[str, Tensor]:
    """Their sum and its gradients: of this rank's tokens, or (None) of all in float64 by torch."""
    mesh = xdist.init_mesh(ring=1 if layout is None else layout.parts)
    shard = xdist.SequenceShard(mesh, layout or xdist.Layout.contiguous(N, 1), CUTS)
    dtype = torch.float64 if layout is None else torch.float32
    given = {n: x.detach()[:, shard.positions].to(dtype) for n, x in inputs.items()}
    for x in given.values():
        x.requires_grad_()
    kernels = "torch" if layout is None else "auto"
    out = xdist.bidirectional(
        xdist.linear_attention, given, None, shard, backend=kernels, merge=True
    )
    weight = torch.linspace(0.5, 1.5, N, dtype=dtype)[shard.positions].view(1, -1, 1, 1)
    grads = torch.autograd.grad((out * weight).sum(), list(given.values()))
    return {"out": out.detach(), **dict(zip(given, grads, strict=True))}


def test_both_directions_of_linear_attention_on_two_ranks(pool2: RankPool) -> None:
    """Zigzag and documents; on two ranks the sum is made of two calls with one exchange."""
    inputs = draw_linear("scalar", torch.Generator().manual_seed(5))
    layout = layouts(N, 2)["zigzag"]
    ranks = OnTriton(pool2).run(of_both_directions, inputs, layout)
    for name, want in of_both_directions(inputs, None).items():
        found = torch.full_like(want, torch.nan)
        for rank, own in enumerate(ranks):
            found[:, layout.positions(rank)] = own[name].double()
        assert relative_error(found, want) < 2e-6, name


# --- convolution, the reference, and what cannot be served --------------------------------------


def check_conv(
    pool: RankPool, parts: int, kind: str, packed: bool, width: int, **rest: Any
) -> None:
    layout = segments(layouts(test_conv1d.N, parts)[kind])
    case = test_conv1d.Case(layout, packed, width, rest["activation"], rest["bias"], torch.float32)
    test_conv1d.check([case], OnTriton(pool))  # type: ignore[arg-type]


def test_causal_conv1d_on_two_ranks(pool2: RankPool) -> None:
    """Uneven shares, and documents that start anywhere."""
    check_conv(pool2, 2, "uneven", True, 3, activation="silu", bias=True)


@pytest.mark.slow
def test_causal_conv1d_on_three_ranks(pool3: RankPool) -> None:
    """Several segments a rank, and a convolution wider than they are."""
    check_conv(pool3, 3, "zigzag", True, 6, activation=None, bias=False)


def on_reference(function: Callable[..., Any], *args: Any) -> Any:
    """On one rank: every op by its token loop in float64."""
    before = backend.set_default("reference")
    try:
        return function(*args)
    finally:
        backend.set_default(before)


class OnReference:
    """A pool whose ranks run every op by its definition."""

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return self.pool.run(on_reference, function, *args)


def test_the_reference_backend_over_two_ranks(pool2: RankPool) -> None:
    """The definition behind the same exchanges: 1e-10 of it on one device, in float64."""
    pool: Any = OnReference(pool2)
    layout = tuple(tuple(layouts(N, 2)["zigzag"].segments(rank)) for rank in range(2))
    for op, variant, algorithm in (
        (LINEAR, "scalar", "gather"), (DELTA, "diagonal", "gather"), (SELECTIVE, "", "chain"),
    ):  # fmt: skip
        check_law_1(op, [Case(layout, variant, "scan", algorithm, True, True, False, 20)], pool)
    mask, rest = Mask(window=5), {"documents": PACKED, "dtype": torch.float64}
    cases = [of_attention("ring", 2, "zigzag", mask, **rest, sinks=True, softcap=2.0)]
    (first,), (second,) = pool.run(attention_cases.run_cases, cases)
    found = attention_cases.errors(cases[0], [first[0], second[0]])
    assert max(found.values()) < 1e-10, found


def refused() -> list[str]:
    """What each rank is told where Triton cannot serve, and bytes moved before that."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(8, 2))
    x = torch.ones(1, 4, 2, 4, dtype=torch.float64)
    said = []
    with xdist.comm.ledger() as moved:
        for call in (
            lambda: xdist.attention(x, x, x, shard, mask=Mask(), backend="triton"),
            lambda: xdist.linear_attention(x, x, x, shard, backend="triton"),
            lambda: xdist.delta_rule(x, x, x, x[..., 0], shard, backend="triton"),
            lambda: xdist.causal_conv1d(x[..., 0], x[0, :2, :, 0], None, shard, backend="triton"),
            lambda: xdist.prefix_attention(x[0, 0], x, x, shard, backend="triton"),
        ):
            with pytest.raises(StrategyError) as error:
                call()
            said.append(error.value.why)
    assert moved.sent_bytes == 0
    return said


def test_a_forced_backend_that_cannot_serve_raises_on_every_rank(pool2: RankPool) -> None:
    """Before anything is sent: no float64, and no Triton kernel of prefix attention at all."""
    first, second = pool2.run(refused)
    assert first == second
    assert all("float64" in why for why in first[:4])
    assert first[4] == "there is no Triton kernel for it"
