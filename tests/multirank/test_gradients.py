"""Gradients of the global mean: one sum over data x sequence, and the true global norm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import xdist
from xdist.cost.moves import reduce_bytes
from xdist.errors import ConfigError, DesyncError
from xdist.testing import RankPool, relative_error

DEGREES = [
    {"data": 2, "ring": 2, "ulysses": 1},
    {"data": 1, "ring": 2, "ulysses": 2},
    {"data": 4, "ring": 1, "ulysses": 1},
]


class Parts(nn.Module):
    """A matrix every rank uses, one only rank 1 uses, one nobody uses, and a frozen one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.every = nn.Parameter(torch.linspace(-1, 1, 15, dtype=dtype).reshape(5, 3))
        self.one = nn.Parameter(torch.linspace(0, 2, 7, dtype=dtype))
        self.nobody = nn.Parameter(torch.ones(2, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def part(self, rank: int) -> torch.Tensor:
        """Rank `rank`'s terms of the loss."""
        x = torch.sin(torch.arange(5, dtype=self.every.dtype) + rank)
        loss = ((x @ self.every).tanh() * (rank + 1)).sum()
        return loss + (self.one**3).sum() if rank == 1 else loss


def _reduced(dtype: torch.dtype, clip: float) -> list[tuple]:
    found = []
    for degrees in DEGREES:
        mesh = xdist.init_mesh(device="cpu", **degrees)
        module = Parts(dtype)
        module.part(mesh.world_rank).backward()
        with xdist.comm.ledger() as moved:
            xdist.reduce_gradients(module, mesh)
        summed = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        with xdist.comm.ledger() as clipping:
            norm = xdist.clip_grad_norm(module, clip, mesh)
        clipped = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        found.append((summed, norm, clipped, moved.sent_bytes, set(moved.by_move), clipping.calls))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_gradients_are_the_sum_over_data_and_sequence(
    pool4: RankPool, dtype: torch.dtype, tolerance: float
) -> None:
    """None on some ranks, None on all, whatever the degrees; equal to the bit on every rank."""
    whole = Parts(torch.float64)
    sum(whole.part(rank) for rank in range(4)).backward()
    whole.nobody.grad = torch.zeros_like(whole.nobody)
    reference = {n: p.grad.clone() for n, p in whole.named_parameters() if p.grad is not None}
    wanted = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    by_rank = pool4.run(_reduced, dtype, 0.5)
    for results in zip(*by_rank, strict=True):
        for rank, (summed, norm, clipped, sent, moves, calls) in enumerate(results):
            assert set(summed) == {"every", "one", "nobody"}
            for name, gradient in summed.items():
                assert gradient.dtype == dtype
                if name == "nobody":
                    assert not gradient.any()
                    continue
                assert relative_error(gradient, reference[name]) <= tolerance
                clip_error = relative_error(clipped[name], whole.get_parameter(name).grad)
                assert clip_error <= tolerance
                assert torch.equal(gradient, results[0][0][name])
            assert abs(float(norm) / float(wanted) - 1) <= tolerance
            assert torch.equal(norm, results[0][1])
            assert moves == {"reduce"}
            assert sent == reduce_bytes(24, 4, rank, dtype.itemsize).sent_bytes
            assert calls == 0


def test_one_rank_is_the_identity() -> None:
    module = Parts(torch.float64)
    module.part(1).backward()
    before = copy.deepcopy({n: p.grad for n, p in module.named_parameters()})
    mesh = xdist.Mesh.one_rank()
    xdist.reduce_gradients(module, mesh)
    for name, parameter in module.named_parameters():
        if before[name] is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, before[name])
    norm = xdist.clip_grad_norm(module, math.inf, mesh)
    squares = sum(float((g**2).sum()) for g in before.values() if g is not None)
    assert abs(float(norm) - squares**0.5) < 1e-12
    assert torch.equal(module.every.grad, before["every"])


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    module = Parts(torch.float32)
    module.part(1).backward()
    module.one.grad[3] = math.nan
    before = module.every.grad.clone()
    assert not torch.isfinite(xdist.clip_grad_norm(module, 0.1, xdist.Mesh.one_rank()))
    assert torch.equal(module.every.grad, before)


def test_a_norm_below_or_at_zero_is_refused() -> None:
    module = Parts(torch.float32)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="positive"):
            xdist.clip_grad_norm(module, wrong, xdist.Mesh.one_rank())


def _clip_too_early() -> str:
    mesh = xdist.init_mesh(device="cpu", ulysses=2)
    module = Parts(torch.float32)
    module.part(0).backward()
    try:
        xdist.clip_grad_norm(module, 1.0, mesh)
    except DesyncError as error:
        return str(error)
    return ""


def test_clipping_before_the_sum_is_refused(pool2: RankPool) -> None:
    for message in pool2.run(_clip_too_early):
        assert "before reduce_gradients" in message
