"""The loss on Triton's kernels over ranks: law 1 in float32, layouts, uneven shares, refusals."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import xdist
from xdist.errors import StrategyError
from xdist.testing import RankPool, layouts, relative_error


def losses_on_ranks() -> list[float]:
    """For each layout and backend: the errors of the loss and of both gradients."""
    from xdist.comm.reduce import start_reduce

    mesh = xdist.init_mesh(ring=2)
    made = torch.Generator().manual_seed(1)
    n, found = 23, []
    hidden = torch.randn(2, n, 6, generator=made, requires_grad=True)
    head = torch.randn(40, 6, generator=made, requires_grad=True)
    labels = torch.randint(0, 40, (2, n), generator=made)
    labels[0, : n // 2] = -100
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    wanted = F.cross_entropy((wide[0] @ wide[1].t()).flatten(0, 1), labels.flatten())
    dhidden, dhead = torch.autograd.grad(wanted, wide)
    for layout in layouts(n, 2, seed=2).values():
        shard = xdist.SequenceShard(mesh, layout)
        own = hidden.detach()[:, shard.positions].requires_grad_()
        loss = xdist.cross_entropy(own, head, labels[:, shard.positions], shard, backend="triton")
        down, dweight = torch.autograd.grad(loss, (own, head))
        total = start_reduce(dweight, mesh.parameter_group).wait()
        found.append(abs(float(loss.detach() - wanted.detach())) / float(wanted.detach()))
        off = (down - dhidden[:, shard.positions]).abs()
        found.append(float(off.max() / dhidden.abs().max()) if off.numel() else 0.0)
        found.append(relative_error(total, dhead))
    return found


def refused_on_ranks() -> tuple[str, int]:
    """What a forced backend says of float64, and the bytes moved until then."""
    shard = xdist.SequenceShard(xdist.init_mesh(ring=2), xdist.Layout.contiguous(7, 2))
    hidden = torch.zeros(1, shard.local_length, 3, dtype=torch.float64)
    labels = torch.zeros(1, shard.local_length, dtype=torch.int64)
    with xdist.comm.ledger() as moved:
        try:
            xdist.cross_entropy(hidden, hidden[0, :2], labels, shard, backend="triton")
        except StrategyError as error:
            return str(error), moved.sent_bytes + moved.control_bytes
    return "nothing was raised", 0


def test_the_triton_loss_over_ranks_is_one_device_s(pool2: RankPool) -> None:
    for found in pool2.run(losses_on_ranks):
        assert max(found) <= 2e-6


def test_a_forced_backend_raises_on_all_ranks_before_anything_is_sent(pool2: RankPool) -> None:
    for said, moved in pool2.run(refused_on_ranks):
        assert "float64" in said
        assert moved == 0
