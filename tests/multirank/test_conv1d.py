"""Law 1, bytes and leaks of xdist.causal_conv1d."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

import xdist
from xdist.cost.recurrent import ConvProblem, conv_bytes
from xdist.errors import ShapeError
from xdist.testing import RankPool, count_c10d_bytes, layouts, relative_error
from xdist_kernels.conv.reference import causal_conv_reference

N = 29
PACKED = (0, 0, 2, 3, 3, 11, 26, N)


@dataclass(frozen=True)
class Case:
    layout: tuple
    packed: bool
    width: int
    activation: str | None
    bias: bool
    dtype: torch.dtype

    @property
    def documents(self) -> tuple[int, ...] | None:
        return PACKED if self.packed else None

    @property
    def problem(self) -> tuple:
        return self.packed, self.width, self.activation, self.bias, self.dtype


def draw(case: Case) -> dict[str, Tensor]:
    """Whole tensors in float64, with values that the case's dtype holds."""
    generator = torch.Generator().manual_seed(case.width)
    shapes = {"x": (2, N, 5), "weight": (5, case.width), "bias": (5,), "dout": (2, N, 5)}
    if not case.bias:
        del shapes["bias"]
    return {
        name: torch.randn(shape, generator=generator).to(case.dtype).double()
        for name, shape in shapes.items()
    }


def run_cases(cases: list[Case]) -> list[dict[str, Tensor]]:
    """On one rank: output and gradients of every case, and bytes against the formula."""
    found = []
    for case in cases:
        mesh = xdist.init_mesh(ring=len(case.layout))
        layout = xdist.Layout.from_segments(N, case.layout)
        shard = xdist.SequenceShard(mesh, layout, case.documents)
        drawn = {name: x.to(case.dtype) for name, x in draw(case).items()}
        dout = drawn.pop("dout")[:, shard.positions]
        drawn["x"] = drawn["x"][:, shard.positions]
        leaves = {name: t.requires_grad_() for name, t in drawn.items()}
        problem = ConvProblem(layout, 2, 5, case.width, leaves["x"].element_size())
        with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
            out = xdist.causal_conv1d(
                leaves["x"],
                leaves["weight"],
                leaves.get("bias"),
                shard,
                activation=case.activation,
            )
        with xdist.comm.ledger() as back, count_c10d_bytes() as counted_back:
            grads = torch.autograd.grad((out * dout).sum(), list(leaves.values()))
        for backward, ledger, second in ((False, moved, counted), (True, back, counted_back)):
            want = conv_bytes(problem, mesh.sequence_rank, backward=backward)
            assert ledger.sent_bytes == want.sent_bytes == second.sent_bytes, case
            assert ledger.received_bytes == want.received_bytes == second.received_bytes, case
        one = {"out": out.detach()}
        one.update({f"d{name}": g for name, g in zip(leaves, grads, strict=True)})
        found.append(one)
    return found


@cache
def reference(problem: tuple) -> dict[str, Tensor]:
    case = Case((), *problem)
    drawn = draw(case)
    dout = drawn.pop("dout")
    leaves = {name: t.requires_grad_() for name, t in drawn.items()}
    out = causal_conv_reference(**leaves, activation=case.activation, cu_seqlens=case.documents)
    grads = torch.autograd.grad((out * dout).sum(), list(leaves.values()))
    found = {"out": out.detach()}
    found.update({f"d{name}": g for name, g in zip(leaves, grads, strict=True)})
    return found


def check(cases: list[Case], pool: RankPool | None) -> None:
    ranks = [run_cases(cases)] if pool is None else pool.run(run_cases, cases)
    for number, case in enumerate(cases):
        layout = xdist.Layout.from_segments(N, case.layout)
        for name, want in reference(case.problem).items():
            parts = [one[number][name].double() for one in ranks]
            if name in ("out", "dx"):
                whole = torch.full(want.shape, torch.nan, dtype=torch.float64)
                for rank, part in enumerate(parts):
                    whole[:, layout.positions(rank)] = part
            else:
                whole = sum(parts)
            error = relative_error(whole, want)
            bound = 1e-10 if case.dtype == torch.float64 else 2e-6
            assert error <= bound, f"{name} is off by {error:.1e} in {case}"


def grid(parts: int, dtype: torch.dtype) -> list[Case]:
    """Widths from 1 to wider than most segments; activation and bias in turn."""
    held = [
        tuple(tuple(layout.segments(r)) for r in range(parts))
        for layout in layouts(N, parts).values()
    ]
    turns = enumerate(product(held, (False, True), (1, 4, 9)))
    return [
        Case(layout, packed, width, ("silu", None)[n % 2], n % 3 > 0, dtype)
        for n, (layout, packed, width) in turns
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_law_1_and_bytes(
    dtype: torch.dtype, pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    """One to four ranks; contiguous, zigzag, drawn, uneven and empty shares; cuts anywhere; and
    for each case ledger = formula = bytes counted by a dispatch mode, forward and backward."""
    for parts, pool in ((1, None), (2, pool2), (3, pool3), (4, pool4)):
        check(grid(parts, dtype), pool)


def leak() -> tuple[bool, bool]:
    mesh = xdist.init_mesh(ring=3)
    layout = layouts(N, 3, seed=2)["drawn"]
    at = torch.from_numpy(layout.positions(mesh.sequence_rank))
    x = torch.randn(1, N, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))

    def outputs(cuts: tuple[int, ...] | None, changed: int | None) -> Tensor:
        mine = x.clone()
        if changed is not None:
            mine[:, changed] += 100.0
        shard = xdist.SequenceShard(mesh, layout, cuts)
        return xdist.causal_conv1d(mine[:, at], weight, None, shard)

    earlier = at < 10
    later = torch.equal(outputs(None, None)[:, earlier], outputs(None, 10)[:, earlier])
    outside = (at < 3) | (at >= 11)  # token 10 ends the document [3, 11)
    return later, torch.equal(outputs(PACKED, None)[:, outside], outputs(PACKED, 10)[:, outside])


def test_nothing_leaks_from_later_tokens_or_other_documents(pool3: RankPool) -> None:
    assert pool3.run(leak) == [(True, True)] * 3


def test_bad_arguments_say_what_was_got() -> None:
    x = torch.zeros(1, 4, 6)
    with pytest.raises(ShapeError, match=r"\(1, 4, 6\) and \(5, 4\)"):
        xdist.causal_conv1d(x, torch.zeros(5, 4))
    with pytest.raises(ShapeError, match="activation must be None or 'silu'; got 'relu'"):
        xdist.causal_conv1d(x, torch.zeros(6, 4), activation="relu")


def test_a_bias_keeps_its_own_dtype_and_digits() -> None:
    """A float32 bias beside a bfloat16 weight: its gradient is not rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, dout = (torch.randn(1, 4096, 4, generator=generator) for _ in range(2))
    weight = torch.randn(4, 4, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    y = xdist.causal_conv1d(x, weight, bias)
    dweight, dbias = torch.autograd.grad(y, (weight, bias), dout)
    assert (dweight.dtype, dbias.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(dbias.double(), dout.double().sum((0, 1))) < 2e-6
