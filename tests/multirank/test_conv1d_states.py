"""xdist.causal_conv1d with initial and final states, and in reverse: law 1, bytes, chaining."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

import xdist
from xdist.cost.conv import conv_final_bytes
from xdist.cost.recurrent import ConvProblem, conv_bytes
from xdist.documents import Documents
from xdist.errors import ShapeError
from xdist.testing import RankPool, count_c10d_bytes, layouts, relative_error
from xdist_kernels.conv.reference import causal_conv_reference

N = 23
PACKED = (0, 0, 2, 3, 3, 11, N)
WHOLE = ("dweight", "dinitial_state")  # the ranks' parts add up


@dataclass(frozen=True)
class Case:
    layout: tuple
    packed: bool
    width: int
    initial: bool
    reverse: bool
    dtype: torch.dtype

    @property
    def cuts(self) -> tuple[int, ...]:
        return PACKED if self.packed else (0, N)

    @property
    def problem(self) -> tuple:
        return self.packed, self.width, self.initial, self.reverse, self.dtype


def draw(case: Case) -> dict[str, Tensor]:
    """Whole tensors in float64, with values that the case's dtype holds."""
    generator = torch.Generator().manual_seed(case.width)
    documents = (len(PACKED) - 1,) if case.packed else ()
    state = (2, *documents, case.width - 1, 5)
    shapes = {"x": (2, N, 5), "weight": (5, case.width), "initial_state": state}
    shapes.update(dout=(2, N, 5), dfinal=state)
    if not case.initial:
        del shapes["initial_state"]
    return {
        name: torch.randn(shape, generator=generator).to(case.dtype).double()
        for name, shape in shapes.items()
    }


def run_cases(cases: list[Case]) -> list[dict[str, Tensor]]:
    """On one rank: outputs, final states and gradients; bytes against the formulas."""
    return [run_case(case) for case in cases]


def run_case(case: Case) -> dict[str, Tensor]:
    mesh = xdist.init_mesh(ring=len(case.layout))
    layout = xdist.Layout.from_segments(N, case.layout)
    shard = xdist.SequenceShard(mesh, layout, PACKED if case.packed else None)
    drawn = {name: x.to(case.dtype) for name, x in draw(case).items()}
    dout, dfinal = drawn.pop("dout")[:, shard.positions], drawn.pop("dfinal")
    drawn["x"] = drawn["x"][:, shard.positions]
    leaves = {name: t.requires_grad_() for name, t in drawn.items()}
    given = dict(leaves)
    with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
        out, final = xdist.causal_conv1d(
            given.pop("x"), given.pop("weight"), None, shard, **given,
            activation="silu", reverse=case.reverse, output_final_state=True,
        )  # fmt: skip
    loss = (out * dout).sum() + (final * dfinal).sum() / layout.parts
    with xdist.comm.ledger() as back, count_c10d_bytes() as counted_back:
        grads = torch.autograd.grad(loss, list(leaves.values()))
    seen = layout.mirrored() if case.reverse else layout
    cuts = tuple(N - cut for cut in reversed(case.cuts)) if case.reverse else case.cuts
    size, rank = out.element_size(), mesh.sequence_rank
    for backward, ledger, second in ((False, moved, counted), (True, back, counted_back)):
        want = conv_bytes(ConvProblem(seen, 2, 5, case.width, size), rank, backward=backward)
        want += conv_final_bytes(
            seen, Documents.of(cuts, N), rank, width=case.width, token_elements=10,
            element_bytes=size, backward=backward,
        )  # fmt: skip
        assert ledger.sent_bytes == want.sent_bytes == second.sent_bytes, case
        assert ledger.received_bytes == want.received_bytes == second.received_bytes, case
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "final": final.detach(), **found}


@cache
def reference(problem: tuple) -> dict[str, Tensor]:
    """Each document alone, its state in front as tokens; in reverse everything is flipped."""
    case = Case((), *problem)
    drawn = draw(case)
    dout, dfinal = drawn.pop("dout"), drawn.pop("dfinal")
    leaves = {name: t.requires_grad_() for name, t in drawn.items()}
    reach = case.width - 1
    states = leaves.get("initial_state", torch.zeros_like(dfinal))
    states = states if case.packed else states.unsqueeze(1)
    outs, finals = [], []
    for number, (start, stop) in enumerate(pairwise(case.cuts)):
        own, state = leaves["x"][:, start:stop], states[:, number]
        parts = [own, state] if case.reverse else [state, own]
        whole = torch.cat(parts, 1)
        if case.reverse:
            y = causal_conv_reference(whole.flip(1), leaves["weight"], activation="silu").flip(1)
            outs.append(y[:, : stop - start])
            finals.append(whole[:, :reach])
        else:
            y = causal_conv_reference(whole, leaves["weight"], activation="silu")
            outs.append(y[:, reach:])
            finals.append(whole[:, whole.shape[1] - reach :])
    out = torch.cat(outs, 1)
    final = torch.stack(finals, 1) if case.packed else finals[0]
    grads = torch.autograd.grad((out * dout).sum() + (final * dfinal).sum(), list(leaves.values()))
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "final": final.detach(), **found}


def check(cases: list[Case], pool: RankPool | None) -> None:
    ranks = [run_cases(cases)] if pool is None else pool.run(run_cases, cases)
    for number, case in enumerate(cases):
        layout = xdist.Layout.from_segments(N, case.layout)
        for name, want in reference(case.problem).items():
            parts = [one[number][name].double() for one in ranks]
            if name in WHOLE:
                whole = sum(parts)
            elif name == "final":
                assert all(torch.equal(part, parts[0]) for part in parts)
                whole = parts[0]
            else:
                whole = torch.full(want.shape, torch.nan, dtype=torch.float64)
                for rank, part in enumerate(parts):
                    whole[:, layout.positions(rank)] = part
            if not want.numel():
                assert whole.shape == want.shape
                continue
            error = relative_error(whole, want)
            bound = 1e-10 if case.dtype == torch.float64 else 2e-6
            assert error <= bound, f"{name} is off by {error:.1e} in {case}"


def grid(parts: int) -> list[Case]:
    held = [
        tuple(tuple(layout.segments(r)) for r in range(parts))
        for layout in layouts(N, parts).values()
    ]
    turns = product(held, (False, True), (False, True), (False, True))
    cases = [
        Case(layout, packed, (4, 9)[(n // 2 + n // 8) % 2], initial, reverse,
             (torch.float64, torch.float32)[n % 3 == 0])
        for n, (layout, packed, initial, reverse) in enumerate(turns)
    ]  # fmt: skip
    return [*cases, Case(held[0], True, 1, True, False, torch.float64)]


def test_law_1_and_bytes_with_states(pool2: RankPool, pool3: RankPool, pool4: RankPool) -> None:
    """One to four ranks, every kind of layout, documents shorter than the convolution and empty
    ones, with and without an initial state, both directions; ledger = formula = second count."""
    for parts, pool in ((1, None), (2, pool2), (3, pool3), (4, pool4)):
        check(grid(parts), pool)


def test_pieces_chain_exactly() -> None:
    """A sequence cut in two, the state handed on, is the sequence; without a shard."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 11, 3).double(), torch.randn(3, 4).double()
    want = xdist.causal_conv1d(x, weight, activation="silu")
    for cut in (1, 2, 7):
        first, state = xdist.causal_conv1d(
            x[:, :cut], weight, activation="silu", output_final_state=True
        )
        rest = xdist.causal_conv1d(x[:, cut:], weight, activation="silu", initial_state=state)
        torch.testing.assert_close(torch.cat([first, rest], 1), want, rtol=1e-13, atol=1e-15)
    mirrored = xdist.causal_conv1d(x.flip(1), weight, activation="silu", reverse=True)
    torch.testing.assert_close(mirrored.flip(1), want, rtol=1e-13, atol=1e-15)


def test_states_of_another_shape_say_what_was_needed() -> None:
    x, weight = torch.zeros(2, 11, 3), torch.zeros(3, 4)
    with pytest.raises(ShapeError, match=r"(?s)\[B, W - 1, C\] = \[2, 3, 3\].*got \[2, 4, 3\]"):
        xdist.causal_conv1d(x, weight, initial_state=torch.zeros(2, 4, 3))
