"""What several calls need of a tile is made once: a rank's summary and its outputs read k and v
once, the adjoint and the gradients q and dout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.started_kernels import started
from tests.kernels.test_triton_delta import draw
from tests.kernels.triton_linear_cases import SCALE, drawn, error, narrowed
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.parallel.recurrence import Recurrence
from xdist.parallel.recurrences.delta import DeltaRule
from xdist.parallel.recurrences.linear import LinearAttention
from xdist.parallel.recurrent_tiles import Share
from xdist.parallel.recurrent_work import Work
from xdist_kernels import delta
from xdist_kernels.launch import HOPPER
from xdist_kernels.linear import triton

N = 96
DECAYS = ("none", "scalar", "diagonal")


def inputs_of(kind: str, *, beta: bool = False) -> tuple[Tensor | None, ...]:
    """q, k, v, beta where it is asked for, and log_decay, of one rank, on meta."""
    x = torch.empty(1, N, 2, 16, dtype=torch.bfloat16, device="meta")
    sizes = {"scalar": 1, "diagonal": 16}
    rates = None if kind == "none" else torch.empty(1, N, 2, sizes[kind], device="meta")
    strengths = (torch.empty(1, N, 2, 1, device="meta"),) if beta else ()
    return x, x, x, *strengths, rates


def on_a_middle_rank(op: Recurrence, inputs: Any) -> tuple[list[str], list[str]]:
    """The kernels of forward and of backward where states enter from one rank and leave for
    another, in the order of strategy scan."""
    share = Share(Layout.contiguous(3 * N, 3), Documents.of(None, 3 * N), 1)
    work = Work(op, share, inputs, None, want_final=False)
    (segment,) = work.segments
    with started(HOPPER) as forward:
        work.start_forward()
        state, _ = work.summary(segment)
        work.ahead()
        work.complete(segment, state)
    with started(HOPPER) as backward:
        work.start_backward(torch.empty_like(work.out), {})
        dstate = work.adjoint_summary(segment)
        work.ahead_back()
        work.complete_back(segment, dstate)
    return [one.kernel for one in forward], [one.kernel for one in backward]


@pytest.mark.parametrize("kind", DECAYS)
def test_linear_attention_sums_a_tile_once_each_way(kind: str) -> None:
    inputs = inputs_of(kind)
    forward, backward = on_a_middle_rank(LinearAttention.of(inputs, 1.0, "triton"), inputs)
    assert forward.count("sum_spans") == 1
    # Once for the states, which are made again, and once for their gradients.
    assert backward.count("sum_spans") == 2
    assert forward.count("scan_spans") == 1


@pytest.mark.parametrize("kind", DECAYS)
def test_the_delta_rule_prepares_a_summary_once(kind: str) -> None:
    """In float32 for state and transition, in the inputs' dtype for the outputs."""
    forward, _ = on_a_middle_rank(DeltaRule(1.0, backend="triton"), inputs_of(kind, beta=True))
    assert forward.count("prepare_kernel") == 2
    assert forward.count("forward_chain_kernel") == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
def test_linear_attention_s_shared_sums_give_the_same_bits(kind: str) -> None:
    """Summaries and gradients; outputs and final states, which take one pass where sums are not
    there, within rounding."""
    torch.manual_seed(0)
    given = drawn(70, kind, torch.float32, dims=(8, 6), heads=(1, 1))
    *inputs, state = narrowed(given, torch.float32)
    plain = triton.prepare(*inputs, scale=SCALE)
    shared = triton.summed(plain)
    assert torch.equal(triton.advance(shared, state), triton.advance(plain, state))
    one, other = triton.transition(shared), triton.transition(plain)
    assert (one is None) == (other is None) == (kind == "none")
    if one is not None and other is not None:
        assert error(one, other.double()) < 1e-6
    out, end = triton.run(plain, state)
    for found in (triton.run(shared, state), triton.run(triton.ahead(shared), state)):
        assert error(found[0], out.double()) < 2e-6
        assert error(found[1], end.double()) < 2e-6
    dout = torch.randn(out.shape)
    back = triton.summed_back(plain, dout)
    assert torch.equal(triton.adjoint(back, dout, end), triton.adjoint(plain, dout, end))
    wanted, before = triton.backward(plain, state, dout, end)
    early = triton.backward_ahead(back, state, dout)
    for tile in (back, early):
        grads, first = triton.backward(tile, state, dout, end)
        assert torch.equal(first, before)
        for a, b in zip(grads, wanted, strict=True):
            assert a is b is None or torch.equal(a, b)
        assert (grads[3] is None) == (kind == "none")


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
def test_the_delta_rule_s_shared_parts_give_the_same_bits(kind: str) -> None:
    """More key dims than value dims: the transition's chain has blocks of its own."""
    torch.manual_seed(1)
    x = draw(20, kind, heads=1, dims=(40, 6))
    form = delta.kernels("triton")
    names = ("q", "k", "v", "beta", "log_decay")
    tile = form.prepare(*(x[name] for name in names), SCALE, chunk=16)
    after, through = form.advance_and_transition(tile, x["state"])
    assert torch.equal(after, form.advance(tile, x["state"]))
    assert torch.equal(through, form.transition(tile))
