"""Second derivatives of moves, losses and checkpoints are refused too, and by whom."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xdist
from xdist.comm.broadcast import broadcast
from xdist.comm.gather import gather, reduce_scatter
from xdist.comm.halo import halo
from xdist.comm.reduce import reduce
from xdist.comm.relayout import relayout
from xdist.comm.ring import blocks
from xdist.comm.scan import scan
from xdist.comm.window import window
from xdist.errors import StrategyError
from xdist.memory.checkpoint import checkpoint
from xdist.memory.mean import mean
from xdist.memory.tiled import tiled
from xdist.nn.gated_norm import NormThenGate, Unit
from xdist.parallel.selective_local import _Finish
from xdist.parallel.ssd_local import Skip, Values
from xdist.testing import RankPool
from xdist_kernels.errors import KernelError
from xdist_kernels.linear import bidirectional as both

ROOT = Path(__file__).resolve().parents[2]
LAYOUT, TURNED = xdist.Layout.contiguous(8, 2), xdist.Layout.zigzag(8, 2)
# Functions whose backward is made of torch's own operations, and moves nothing: torch has their
# second derivative.
OF_TORCH = {
    "_Finish", "_Mean", "_Scatter", "_Steps",
    "GateThenNorm", "NormThenGate", "Skip", "Unit", "Values",
}  # fmt: skip


def moves(mesh: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Of this rank's x [1, 4, 2]: one value each, through one move."""
    group = mesh.sequence_group
    shard = xdist.SequenceShard(mesh, LAYOUT)
    layer = nn.Linear(2, 2, dtype=torch.float64)
    labels = torch.ones(1, 4, dtype=torch.int64)
    return {
        "switch": lambda x: xdist.switch(x, group, from_dim=1, to_dim=2),
        "shard.gather": shard.gather,
        "gather": lambda x: gather(x, group, dim=1),
        "reduce_scatter": lambda x: reduce_scatter(x, group, dim=1, sizes=(2, 2)),
        "reduce": lambda x: reduce(x, group),
        "broadcast": lambda x: broadcast(x, group, root=0),
        "relayout": lambda x: relayout(x, group, dim=1, source=LAYOUT, target=TURNED),
        "halo": lambda x: halo(x, LAYOUT, group, dim=1, before=2)[0].before,
        "window": lambda x: window(
            x, LAYOUT, group, dim=1, windows=((0, 6), (2, 8))
        ),
        "ring": lambda x: blocks(x, group, dim=1, sizes=(4, 4), needs=((1,), (0,)))[0],
        "scan": lambda x: scan(
            x[:, :2], None, LAYOUT, group, transition="none"
        ),
        "cross_entropy": lambda x: xdist.cross_entropy(x, layer.weight, labels, shard),
        "checkpoint": lambda x: checkpoint(layer, x),
        "tiled": lambda x: tiled(layer, x),
    }  # fmt: skip


def refused() -> dict[str, str]:
    """On one rank, of each move: what a second derivative is refused with."""
    mesh = xdist.init_mesh(ring=2)
    found = {}
    for name, move in moves(mesh).items():
        x = torch.ones(1, 4, 2, dtype=torch.float64, requires_grad=True)
        # Beside x ** 2 the part that is missing would go unnoticed.
        loss = move(x**2).square().sum() + (x**2).sum()
        try:
            torch.autograd.grad(loss, x, create_graph=True)
            found[name] = "nothing"
        except StrategyError as error:
            found[name] = str(error)
        loss = move(x**2).square().sum() + (x**2).sum()
        assert torch.autograd.grad(loss, x)[0].isfinite().all()
    return found


def test_a_second_derivative_of_a_move_is_refused(pool2: RankPool) -> None:
    for found in pool2.run(refused):
        wrong = {n: said for n, said in found.items() if "no second derivative" not in said}
        assert not wrong


def test_every_backward_by_hand_refuses_or_is_made_of_torch() -> None:
    others = set()
    for path in [*(ROOT / "xdist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            if not any(ast.unparse(base).endswith("Function") for base in node.bases):
                continue
            (back,) = [
                f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "backward"
            ]
            refuses = "raise KernelError" in ast.unparse(back.body[0])  # kernels know no xdist
            if "first_order" not in map(ast.unparse, back.decorator_list) and not refuses:
                others.add(node.name)
    assert others == OF_TORCH


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_a_second_derivative_of_both_directions_is_refused() -> None:
    x = rows(1, 5, 2, 3)
    out = both.bidirectional(x, x, x, backend="torch").square().sum()
    with pytest.raises(KernelError, match="no second derivative"):
        torch.autograd.grad(out, x, create_graph=True)


@pytest.mark.parametrize("name", ["values", "skip", "finish", "norm", "unit", "mean", "scatter"])
def test_what_is_made_of_torch_has_a_second_derivative(name: str) -> None:
    torch.manual_seed(0)
    x, one = rows(1, 5, 2, 3), rows(1, 5, 3)
    cases: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "values": (Values.apply, (rows(1, 5, 2), x)),
        "skip": (Skip.apply, (x, rows(1, 5, 2, 3), rows(2))),
        "finish": (_Finish.apply, (one, rows(1, 5, 3), rows(3), rows(1, 5, 3))),
        "norm": (
            lambda *given: NormThenGate.apply(*given, "sigmoid", 1e-5),
            (x, rows(1, 5, 2, 3), rows(3)),
        ),
        "unit": (lambda x: Unit.apply(x, 1e-6), (x,)),
        "mean": (mean, (x,)),
        "scatter": (
            xdist.SequenceShard(xdist.init_mesh(), xdist.Layout.contiguous(5, 1)).scatter, (one,)
        ),
    }  # fmt: skip
    function, given = cases[name]
    assert torch.autograd.gradgradcheck(function, given)
