"""Linear attention from both ends, summed: Triton's merged form and torch's two calls, against two
float64 token loops."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted_grid import only_last_programs
from tests.kernels.triton_linear_cases import (
    SCALE,
    Drawn,
    apart,
    compare,
    drawn,
    error,
    narrowed,
    starts_of,
    token_loop,
)
from xdist_kernels.errors import KernelError
from xdist_kernels.linear import bidirectional as both
from xdist_kernels.linear import triton_bidirectional
from xdist_kernels.linear.reference import linear_attention_reference


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of one or two chunks, so that few tokens have several."""
    monkeypatch.setattr(triton_bidirectional, "SPAN_TOKENS", 64)


def mirrored(given: Drawn, state: Tensor) -> Drawn:
    """The same tokens from the last to the first, from another state."""
    flipped = [None if x is None else x.flip(1) for x in given[:4]]
    return Drawn(*flipped, state)  # type: ignore[arg-type]


class Both(NamedTuple):
    """What two token loops say, the other direction's results in the order of positions."""

    results: tuple[Tensor, ...]  # out, the state behind the last token, the one before the first
    dout: Tensor
    dends: both.Sides
    grads: list[Tensor | None]  # of q, k, v, log_decay and the states of both directions
    other: Tensor  # the state behind the last token, from which the other direction starts


def two_loops(given: Drawn, cuts: tuple[int, ...], dtype: torch.dtype) -> Both:
    other = torch.randn(given.state.shape).double()
    forth = token_loop(given, cuts, dtype)
    flipped = [None if x is None else x.flip(1) for x in given[:4]]
    mirror = Drawn(*flipped, other)  # type: ignore[arg-type]
    mirrored_cuts = tuple(cuts[-1] - cut for cut in reversed(cuts))
    back = token_loop(mirror, mirrored_cuts, dtype, forth.dout.flip(1))
    grads = [
        None if a is None or b is None else a + b.flip(1)
        for a, b in zip(forth.grads[:4], back.grads[:4], strict=True)
    ]
    return Both(
        (forth.out + back.out.flip(1), forth.end, back.end),
        forth.dout,
        both.Sides(forth.dend.float(), back.dend.float()),
        [*grads, forth.grads[4], back.grads[4]],
        other,
    )


@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "documents"])
@pytest.mark.usefixtures("poisoned", "short_spans")
def test_the_sum_and_every_gradient(decay: str, packed: bool) -> None:
    """Several spans, states into and out of both ends, shared heads; memory starts as NaN."""
    torch.manual_seed(0)
    n = 77
    cuts = (0, 3, 4, 32, 63, 64, 76, n) if packed else (0, n)
    check(drawn(n, decay, torch.float32), cuts, torch.float32, ("merged", "twice"))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.usefixtures("poisoned", "short_spans")
def test_heads_of_more_than_a_block(decay: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    check(drawn(130, decay, dtype, dims=(72, 80)), (0, 100, 130), dtype, ("merged",))


@pytest.mark.usefixtures("poisoned")
def test_float16_of_one_span() -> None:
    torch.manual_seed(2)
    given = drawn(66, "scalar", torch.float16, dims=(16, 24), heads=(1, 1))
    check(given, (0, 66), torch.float16, ("merged",))


def check(given: Drawn, cuts: tuple[int, ...], dtype: torch.dtype, ways: tuple[str, ...]) -> None:
    wanted = two_loops(given, cuts, dtype)
    *inputs, state = narrowed(given, dtype)
    sides = both.Sides(state, wanted.other.float())
    forms: dict[str, tuple[Any, Any]] = {
        "merged": (both.run_merged, both.backward_merged),
        "twice": (
            partial(both.run_twice, backend="torch"),
            partial(both.backward_twice, backend="torch"),
        ),
    }
    for way in ways:
        run, back = forms[way]
        out, ends = run(*inputs, starts_of(cuts), sides, scale=SCALE)
        compare((out, *ends), wanted.results, dtype, way)
        dout = wanted.dout.to(dtype)
        grads, dsides = back(*inputs, starts_of(cuts), sides, dout, wanted.dends, scale=SCALE)
        assert (grads[3] is None) == (given.log_decay is None)
        compare((*grads, *dsides), wanted.grads, dtype, way)


def ways_of(inputs: Any, sides: both.Sides, dout: Tensor, dsides: both.Sides) -> list[Tensor]:
    """All that the merged form makes: out, states, gradients."""
    out, ends = both.run_merged(*inputs, None, sides, scale=SCALE)
    grads, dfirsts = both.backward_merged(*inputs, None, sides, dout, dsides, scale=SCALE)
    return [x for x in (out, *ends, *grads, *dfirsts) if x is not None]


@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.usefixtures("short_spans")
def test_offsets_past_2_to_the_31(decay: str) -> None:
    """q, k, v, decays and dout, each with its last token 2^31 elements behind its first: the values
    of plain copies."""
    torch.manual_seed(4)
    n, dim = 34, 4
    *near, dout = [torch.randn(1, n, 1, dim).half() for _ in range(4)]
    rates = None if decay == "none" else -torch.rand(1, n, 1, 1)
    sides, dsides = (both.Sides(*torch.randn(2, 1, 1, dim, dim)) for _ in range(2))
    *distant, dout_apart = apart(*near, dout)
    rates_apart = None if rates is None else apart(rates)[0]
    found = ways_of((*distant, rates_apart), sides, dout_apart, dsides)
    wanted = ways_of((*near, rates), sides, dout, dsides)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_grids_past_65535(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """70,000 heads that share their memory: the last program of every grid finds its place."""
    torch.manual_seed(5)
    # A chunk of float32, so that the last program has tokens.
    monkeypatch.setattr(triton_bidirectional, "SPAN_TOKENS", 32)
    heads, n, dim = 70_000, 3, 2
    one = [torch.randn(1, n, 1, dim) for _ in range(3)]
    rates = None if decay == "none" else -torch.rand(1, n, 1, 1)
    dout = torch.randn(1, n, 1, dim)
    sides, dsides = (both.Sides(*torch.randn(2, 1, 1, dim, dim)) for _ in range(2))
    wanted = ways_of((*one, rates), sides, dout, dsides)

    def many(x: Tensor | None, at: int = 2) -> Any:
        sizes = [-1] * 4
        sizes[at] = heads
        return None if x is None else x.expand(sizes)

    names = ("linear.triton_bidirectional", "linear.triton_states", "linear.triton_gate")
    grids = [only_last_programs(monkeypatch, f"xdist_kernels.{name}") for name in names]
    all_sides, all_dsides = (both.Sides(*(many(x, 1) for x in pair)) for pair in (sides, dsides))
    found = ways_of([many(x) for x in (*one, rates)], all_sides, many(dout), all_dsides)
    assert [len(grid) > 0 for grid in grids] == [True, True, decay == "scalar"]
    # One program a head: the last one's is the last head.
    assert {programs for grid in grids for programs in grid} == {heads}
    for a, b in zip(found, wanted, strict=True):
        last = a[:, -1:] if a.shape[1] == heads else a[:, :, -1:]
        assert torch.equal(last, b)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("kind", ["fixed", "diagonal"])
def test_as_a_function(backend: str, kind: str) -> None:
    """A decay a head, and one a key dim, which takes two calls; gradients by autograd."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 20, 2, 4, requires_grad=True) for _ in range(3))
    decay = torch.tensor([-0.02, -0.3], requires_grad=True)
    if kind == "diagonal":
        decay = (-torch.rand(1, 20, 2, 4)).requires_grad_()
    found = both.bidirectional(q, k, v, decay, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, decay)]
    forth, _ = linear_attention_reference(*wide)
    other = wide[3] if kind == "fixed" else wide[3].flip(1)
    back, _ = linear_attention_reference(*(x.flip(1) for x in wide[:3]), other)
    wanted = forth + back.flip(1)
    seed = torch.randn(found.shape)
    grads = torch.autograd.grad(found, (q, k, v, decay), seed)
    wanted_grads = torch.autograd.grad(wanted, wide, seed.double())
    for a, b in zip((found, *grads), (wanted, *wanted_grads), strict=True):
        # One number a head is a sum over all tokens, whose terms are of both signs.
        assert error(a, b) < (1e-5 if a.dim() == 1 else 2e-6)


def test_what_cannot_be_served_says_why() -> None:
    wide = torch.zeros(1, 4, 2, 300)
    with pytest.raises(KernelError, match="head dims go up to 256"):
        both.bidirectional(wide, wide, wide, backend="triton")
    with pytest.raises(KernelError, match="log_decay must be"):
        both.bidirectional(wide, wide, wide, torch.zeros(1, 4))
