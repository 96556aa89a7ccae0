"""Steps, skip and gate of the selective scan against plain torch: values and every gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from xdist.parallel.selective_local import Local


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), leaves)
    return [out.detach(), *found]


def agree(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).abs().max()) <= bound * float(b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_steps(dtype: torch.dtype) -> None:
    """From softplus of -60, which is 1e-26, to 40, where it is the identity."""
    torch.manual_seed(0)
    for softly, biased in ((True, True), (True, False), (False, True)):
        delta = torch.linspace(-60, 40, 60).view(2, 10, 3).to(dtype).double().requires_grad_()
        bias = torch.randn(3).to(dtype).double().requires_grad_()
        leaves = [delta, bias] if biased else [delta]
        want = delta + bias if biased else delta
        want = softplus(want) if softly else want
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        local = Local(delta_bias=own[1] if biased else None, delta_softplus=softly)
        got = local.steps(own[0])
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        agree(gradients(got, own), gradients(want, leaves), dtype)
        if softly:
            # Every step for itself: the small ones are as exact as the large ones.
            bound = 1e-13 if dtype == torch.float64 else 1e-5
            assert float((got / want - 1).detach().abs().max()) < bound


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_skip_and_gate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdist.parallel.selective_local.TILE_TOKENS", 4)
    torch.manual_seed(1)
    for skip, gate in product((False, True), repeat=2):
        shapes = {"out": (2, 10, 3), "u": (2, 10, 3), "D": (3,), "z": (2, 10, 3)}
        names = ["out", *(["u", "D"] if skip else []), *(["z"] if gate else [])]
        x = {n: torch.randn(shapes[n]).to(dtype).double().requires_grad_() for n in names}
        want = x["out"]
        want = want + x["u"] * x["D"] if skip else want
        want = want * silu(x["z"]) if gate else want
        own = {n: y.detach().to(dtype).requires_grad_() for n, y in x.items()}
        u = own.get("u", torch.randn(2, 10, 3).to(dtype))
        got = Local(own.get("D"), own.get("z")).finish(u, own["out"])
        assert got.dtype == dtype
        agree(gradients(got, list(own.values())), gradients(want, list(x.values())), dtype)


def test_a_share_without_tokens_stays_in_the_graph() -> None:
    empty, D = torch.zeros(2, 0, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    local = Local(D, empty, D, True)
    out = local.finish(empty, local.steps(empty))
    (grad,) = torch.autograd.grad(out.sum(), [D])
    assert torch.equal(grad, torch.zeros(3))
