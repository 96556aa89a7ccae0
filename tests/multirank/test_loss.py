"""cross_entropy and mean over ranks; checkpointing repeats no exchange."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdist
from xdist.cost.model import loss_bytes
from xdist.memory.checkpoint import checkpoint
from xdist.nn import Block, build_mixer
from xdist.testing import RankPool, count_c10d_bytes, layouts


def drawn(n: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, n, 6], head [11, 6], labels [rows, n] with uneven ignored runs; float64."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, n, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (rows, n), generator=generator)
    labels[0, : n // 2] = -100
    labels[-1, n // 3 : n - 1] = -100
    return hidden, head, labels


def loss_cases(data: int, ring: int) -> list[float]:
    """The largest error of loss, hidden's and head's gradient for each layout, on this rank."""
    from xdist.comm.reduce import start_reduce

    mesh = xdist.init_mesh(data=data, ring=ring)
    n, found = 23, []
    for layout in layouts(n, ring, seed=2).values():
        shard = xdist.SequenceShard(mesh, layout)
        hidden, head, labels = drawn(n, 2 * data)
        hidden, head = hidden.requires_grad_(), head.requires_grad_()
        wanted = F.cross_entropy((hidden @ head.t()).flatten(0, 1), labels.flatten())
        dhidden, dhead = torch.autograd.grad(3.0 * wanted, (hidden, head))
        rows = slice(2 * mesh.data_rank, 2 * mesh.data_rank + 2)
        own = hidden.detach()[rows][:, shard.positions].requires_grad_()
        weight = head.detach().clone().requires_grad_()
        mine = labels[rows][:, shard.positions]
        for valid in (None, int((labels != -100).sum())):
            loss = xdist.cross_entropy(own, weight, mine, shard, valid_tokens=valid)
            down, dweight = torch.autograd.grad(3.0 * loss, (own, weight))
            total = start_reduce(dweight, mesh.parameter_group).wait()
            off = (down - dhidden[rows][:, shard.positions]).abs()
            found.append(abs(float(loss - wanted)))
            found.append(float(off.max()) if off.numel() else 0.0)
            found.append(float((total - dhead).abs().max()))
    return found


def test_cross_entropy_is_the_global_mean_at_data_two_by_sequence_two(pool4: RankPool) -> None:
    for found in pool4.run(loss_cases, 2, 2):
        assert max(found) <= 1e-12


def test_cross_entropy_on_three_ranks_of_one_sequence(pool3: RankPool) -> None:
    for found in pool3.run(loss_cases, 1, 3):
        assert max(found) <= 1e-12


def ignored_and_mean() -> None:
    """No valid token anywhere; the mean's value, gradient and bytes."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(7, 2))
    hidden, head, labels = drawn(7, 1)
    own = hidden[:, shard.positions].requires_grad_()
    nothing = torch.full_like(labels, -100)[:, shard.positions]
    with count_c10d_bytes() as counted, xdist.comm.ledger() as moved:
        loss = xdist.cross_entropy(own, head.requires_grad_(), nothing, shard)
        loss.backward()
    assert float(loss) == 0.0
    assert own.grad is not None
    assert float(own.grad.abs().max()) == 0.0
    wanted = loss_bytes(2, mesh.sequence_rank, counted=True)
    traffic = moved.by_move["reduce"]
    assert (traffic.sent_bytes, traffic.received_bytes) == tuple(wanted)
    assert moved.sent_bytes == counted.sent_bytes
    x = torch.arange(7.0)[shard.positions].double().requires_grad_()
    weight = torch.tensor([0.0, 1, 1, 2, 0, 1, 3])[shard.positions].double()
    value = xdist.mean(x, shard, weight=weight)
    assert abs(float(value) - (1 + 2 + 6 + 5 + 18) / 8) < 1e-12
    (dx,) = torch.autograd.grad(2 * value, x)
    assert torch.allclose(dx, 2 * weight / 8, rtol=0, atol=1e-15)
    assert float(xdist.mean(x, shard)) == 3.0
    assert float(xdist.mean(x * float("nan"), shard, weight=0 * weight)) == 0.0


def test_no_valid_token_gives_zeros_and_mean_is_global(pool2: RankPool) -> None:
    pool2.run(ignored_and_mean)


def checkpointed_block(kind: str) -> None:
    """A checkpointed block: same numbers, and the exchanges of forward and of backward once."""
    mesh = xdist.init_mesh(ring=3)
    for layout in layouts(31, 3, seed=4).values():
        shard = xdist.SequenceShard(mesh, layout, [0, 12, 31])
        torch.manual_seed(0)
        options = {"window": 5, "strategy": "halo"} if kind == "attention" else {}
        block = Block(build_mixer(kind, 8, head_dim=4, **options), 8, 16).double()
        nn.init.normal_(block.mlp.down)
        x = torch.randn(2, 31, 8, dtype=torch.float64)[:, shard.positions].requires_grad_()
        held = [x, *block.parameters()]
        with xdist.comm.ledger() as plain:
            out = block(x, shard)
            wants = torch.autograd.grad(out.square().sum(), held)
        with xdist.comm.ledger() as kept:
            again = checkpoint(block, x, shard)
            owns = torch.autograd.grad(again.square().sum(), held)
        assert torch.equal(out, again)
        for own, want in zip(owns, wants, strict=True):
            assert torch.equal(own, want)
        assert (kept.sent_bytes, kept.calls) == (plain.sent_bytes, plain.calls)


def test_a_checkpointed_layer_repeats_no_exchange(pool3: RankPool) -> None:
    pool3.run(checkpointed_block, "gated_linear")
    pool3.run(checkpointed_block, "attention")
