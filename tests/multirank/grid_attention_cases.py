"""Attention on grids as problems: draws, float64 references by loops, and what ranks run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import xdist
from xdist.cost.attention import attention_cost
from xdist.cost.attention_keys import Problem as AttentionProblem
from xdist.cost.axial import Axial, axial_choice, axial_switch_bytes, axial_switch_dim
from xdist.cost.moves import Moved
from xdist.cost.neighborhood import (
    class_step,
    grid_attention_bytes,
    neighborhood_bytes,
    window_attention_bytes,
)
from xdist.testing import count_c10d_bytes
from xdist_kernels.neighborhood.reference import blocks, near, sets_reference, strided

BATCH = 2


@dataclass(frozen=True)
class Problem:
    """One call: which op on which grid, with its settings a dim."""

    op: str
    sizes: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...] = ()
    heads: tuple[int, int] = (2, 2)
    bias: bool = False
    strategy: str = "auto"
    causal: bool = False
    widths: tuple[int, int] = (3, 2)

    @property
    def arguments(self) -> dict[str, object]:
        """Keywords of the public function."""
        if self.op == "near":
            return {"window": self.first, "dilation": self.second}
        if self.op == "blocks":
            return {"window": self.first, "shift": self.second}
        if self.op == "strided":
            return {"grid": self.first}
        mask = xdist.Mask(causal=self.causal)
        return {"dim": self.first[0], "strategy": self.strategy, "mask": mask}

    def sees(self) -> list[list[list[int]]]:
        """Of each dim and position, the positions seen."""
        if self.op == "near":
            return [near(*one) for one in zip(self.sizes, self.first, self.second, strict=True)]
        if self.op == "blocks":
            return [blocks(*one) for one in zip(self.sizes, self.first, self.second, strict=True)]
        if self.op == "strided":
            return [strided(n, -(-n // g)) for n, g in zip(self.sizes, self.first, strict=True)]
        found = [[[at] for at in range(n)] for n in self.sizes]
        n = self.sizes[self.first[0]]
        found[self.first[0]] = [list(range(at + 1 if self.causal else n)) for at in range(n)]
        return found

    def steps(self) -> tuple[int, ...]:
        """Distance between keys, in which a bias counts."""
        if self.op == "near":
            return self.second
        if self.op == "strided":
            return tuple(class_step(n, g) for n, g in zip(self.sizes, self.first, strict=True))
        return (1,) * len(self.sizes)


OPS = {
    "near": "neighborhood_attention",
    "blocks": "window_attention",
    "strided": "grid_attention",
    "axial": "axial_attention",
}


@dataclass(frozen=True)
class Case:
    """A problem sharded first along `dim`, in a dtype, drawn from a seed."""

    problem: Problem
    dim: int
    dtype: torch.dtype = torch.float64
    seed: int = 0


def draw(problem: Problem, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Whole tensors in float64 with values that `dtype` holds."""
    generator = torch.Generator().manual_seed(seed)
    (h, g), (d, e) = problem.heads, problem.widths
    grid = (BATCH, *problem.sizes)
    shapes = {"q": (*grid, h, d), "k": (*grid, g, d), "v": (*grid, g, e), "dout": (*grid, h, e)}
    if problem.bias:
        shapes["position_bias"] = (h, *(2 * w - 1 for w in problem.first))
    return {
        name: torch.randn(shape, generator=generator).to(dtype).double()
        for name, shape in shapes.items()
    }


@cache
def reference(problem: Problem, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Output and gradients by the loop over queries."""
    drawn = draw(problem, dtype, seed)
    dout = drawn.pop("dout")
    leaves = {name: x.requires_grad_() for name, x in drawn.items()}
    out = sets_reference(**leaves, sees=problem.sees(), steps=problem.steps())
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def run(case: Case, gshard: xdist.GridShard | None) -> tuple[dict[str, Tensor], str]:
    """This rank's output and gradients, and what was wrong with its bytes."""
    problem = case.problem
    drawn = {name: x.to(case.dtype) for name, x in draw(problem, case.dtype, case.seed).items()}
    if gshard is not None:
        drawn = {
            name: x if name == "position_bias" else gshard.scatter(x).detach()
            for name, x in drawn.items()
        }
    dout = drawn.pop("dout")
    leaves = {name: x.clone().requires_grad_() for name, x in drawn.items()}
    op = getattr(xdist, OPS[problem.op])
    with xdist.comm.ledger() as forth, count_c10d_bytes() as counted:
        out = op(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            gshard,
            **problem.arguments,
            **({"position_bias": leaves["position_bias"]} if problem.bias else {}),
        )
    with xdist.comm.ledger() as back, count_c10d_bytes() as counted_back:
        out.backward(dout)
    found = {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    wrong = ""
    if gshard is not None and gshard.size > 1:
        said = expected(case, gshard, dout.element_size())
        for moved, count, (sent, received) in (
            (forth, counted, said[:2]),
            (back, counted_back, said[2:]),
        ):
            seen = (moved.sent_bytes, count.sent_bytes, moved.received_bytes)
            if seen != (sent, sent, received):
                wrong += f" {seen} bytes, not {sent}, {received};"
    return found, wrong


def expected(case: Case, gshard: xdist.GridShard, itemsize: int) -> tuple[int, int, int, int]:
    """Sent and received, forward and backward, by the formulas."""
    problem, size, at = case.problem, gshard.size, gshard.rank
    n = problem.sizes[case.dim]
    rest = BATCH * torch.Size(problem.sizes).numel() // n
    (h, g), (d, e) = problem.heads, problem.widths
    if problem.op in ("near", "blocks"):
        settings = {"window": problem.first[case.dim], "other": rest * g * (d + e)}
        other = "dilation" if problem.op == "near" else "shift"
        settings[other] = problem.second[case.dim]
        formula = neighborhood_bytes if problem.op == "near" else window_attention_bytes
        forth = formula(n, size, at, itemsize=itemsize, **settings)
        back = formula(n, size, at, itemsize=itemsize, backward=True, **settings)
    elif problem.op == "strided":
        inputs, outputs = rest * (h * d + g * (d + e)), rest * h * e
        forth = grid_attention_bytes(
            n,
            size,
            at,
            grid=problem.first[case.dim],
            keys=inputs,
            outputs=outputs,
            itemsize=itemsize,
        )
        back = forth.back()
    elif problem.first[0] != case.dim:
        forth = back = Moved()
    else:
        return _axial_bytes(case, gshard, itemsize)
    return (*forth, *back)


def _axial_bytes(case: Case, gshard: xdist.GridShard, itemsize: int) -> tuple[int, int, int, int]:
    problem = case.problem
    (h, g), (d, e) = problem.heads, problem.widths
    call = Axial(
        problem.sizes,
        case.dim,
        gshard.size,
        xdist.Mask(causal=problem.causal),
        BATCH,
        h,
        g,
        d,
        e,
        itemsize,
        (h * d + g * (d + e), h * e),
    )
    strategy = axial_choice(call) if problem.strategy == "auto" else problem.strategy
    if strategy == "switch":
        to = axial_switch_dim(problem.sizes, case.dim, gshard.size)
        forth = axial_switch_bytes(call, to, gshard.rank)
        return (*forth, *forth.back())
    attention: AttentionProblem = call.problem
    cost = attention_cost(attention, strategy, gshard.rank)
    return (
        cost.forward_sent_bytes,
        cost.forward_received_bytes,
        cost.backward_sent_bytes,
        cost.backward_received_bytes,
    )


def run_cases(cases: list[Case]) -> list[tuple[dict[str, Tensor], str]]:
    """On one rank: every case in turn."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    return [run(case, xdist.GridShard(mesh, case.problem.sizes, case.dim)) for case in cases]


def joined(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors from the ranks' parts: put together, the bias's gradient summed."""
    return {
        name: torch.stack([part[name] for part in parts]).sum(0)
        if name == "position_bias"
        else torch.cat([part[name] for part in parts], case.dim + 1)
        for name in parts[0]
    }
