"""SequenceShard on real ranks: scatter, gather, gradients, agreement."""

from __future__ import annotations

import pytest
import torch

import xdist
from tests.multirank.comm_cases import bytes_are, close, draw, exact, layout_cases, mesh_of
from xdist import comm
from xdist.comm.checks import raise_together
from xdist.cost import moves as cost
from xdist.errors import DesyncError, LayoutError, NumericsError, ShapeError
from xdist.layout import Layout
from xdist.shard import SequenceShard, resolve
from xdist.testing import RankPool


def _scatter_and_gather(parts: int) -> bool:
    mesh = mesh_of(parts)
    me = mesh.sequence_rank
    for name, layout in layout_cases(parts):
        n = layout.length
        cuts = [0, n // 3, n // 3, n]
        shard = SequenceShard(mesh, layout, torch.tensor(cuts))
        positions = torch.from_numpy(layout.positions(me))
        exact(shard.positions, positions, name)
        inside = torch.where(positions < n // 3, positions, positions - n // 3)
        exact(shard.document_positions, inside, name)
        assert shard.local_length == len(positions)
        for dim, dtype in ((0, torch.float64), (1, torch.float32), (-1, torch.bfloat16)):
            _round_trip(shard, parts, dim, dtype, name)
    return True


def _round_trip(shard: SequenceShard, parts: int, dim: int, dtype: torch.dtype, name: str) -> None:
    layout, me = shard.layout, shard.rank
    shape = [2, 2, 2]
    shape[dim] = layout.length
    index = torch.from_numpy(layout.positions(me))
    whole = draw(*shape, seed=1, dtype=dtype).requires_grad_()
    part = shard.scatter(whole, dim=dim)
    exact(part, whole.detach().index_select(dim, index), name)
    upstream = draw(*part.shape, seed=2, dtype=dtype)
    part.backward(upstream)
    want = torch.zeros(shape, dtype=dtype).index_copy(dim, index, upstream)
    assert whole.grad is not None
    exact(whole.grad, want, name)
    local = part.detach().requires_grad_()
    sizes = layout.local_lengths
    there = cost.gather_bytes(sizes, me, 4, dtype.itemsize)
    with bytes_are(there, "gather", name):
        again = shard.gather(local, dim=dim)
    exact(again, whole.detach(), name)
    grads = [draw(*shape, seed=10 + r, dtype=dtype) for r in range(parts)]
    with bytes_are(cost.reduce_scatter_bytes(sizes, me, 4, dtype.itemsize), "gather", name):
        again.backward(grads[me])
    total = torch.stack(grads).double().sum(0).to(dtype)
    assert local.grad is not None
    close(local.grad, total.index_select(dim, index), name)


def test_one_rank() -> None:
    assert _scatter_and_gather(1)


def test_two_ranks(pool2: RankPool) -> None:
    assert all(pool2.run(_scatter_and_gather, 2))


def test_three_ranks(pool3: RankPool) -> None:
    assert all(pool3.run(_scatter_and_gather, 3))


def test_four_ranks(pool4: RankPool) -> None:
    assert all(pool4.run(_scatter_and_gather, 4))


def _disagree() -> tuple[str, str, str, int, int]:
    mesh = xdist.init_mesh(ring=3, device="cpu")
    me = mesh.sequence_rank
    messages = []
    with comm.ledger() as moved:
        for layout, documents in (
            (Layout.zigzag(12, 3) if me == 1 else Layout.contiguous(12, 3), None),
            (Layout.contiguous(12, 3), [0, 5 + (me == 2), 12]),
        ):
            with pytest.raises(DesyncError) as caught:
                SequenceShard(mesh, layout, documents)
            messages.append(str(caught.value))
        with pytest.raises(NumericsError) as faulty:
            raise_together(mesh.sequence_group, me == 1, lambda r: NumericsError(f"NaN on {r}"))
    return *messages, str(faulty.value), moved.control_bytes, moved.sent_bytes


def test_ranks_that_disagree_all_raise_the_same(pool3: RankPool) -> None:
    results = pool3.run(_disagree)
    assert len(set(results)) == 1
    layouts, documents, faulty, control, sent = results[0]
    assert "ranks [1] differ" in layouts
    assert "ranks [2] differ" in documents
    assert faulty == "NaN on [1]"
    assert (control, sent) == (2 * (32 + 32 + 8), 0)


def test_no_shard_is_one_rank() -> None:
    shard = resolve(None, 5)
    assert (shard.size, shard.rank, shard.group, shard.local_length) == (1, 0, None, 5)
    x = torch.arange(10.0).view(2, 5)
    with comm.ledger() as moved:
        assert torch.equal(shard.gather(shard.scatter(x)), x)
    assert moved.calls == 0
    assert resolve(shard, 7) is shard


def test_wrong_sizes_are_refused() -> None:
    shard = resolve(None, 5)
    with pytest.raises(ShapeError, match="the sequence has 5"):
        shard.scatter(torch.zeros(1, 4))
    with pytest.raises(ShapeError, match="holds 5"):
        shard.gather(torch.zeros(1, 6))
    with pytest.raises(LayoutError, match="2 ranks"):
        SequenceShard(shard.mesh, Layout.contiguous(5, 2))
