"""GridShard: parts, switches between any two dims, windows and several resolutions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import xdist
from xdist.comm import ledger
from xdist.cost.moves import sum_itemsize, switch_bytes, window_bytes
from xdist.errors import DesyncError, LayoutError, ShapeError
from xdist.testing import RankPool, count_c10d_bytes

SIZES = (5, 4, 2, 3)  # fewer positions than ranks, uneven ones, even ones


def whole(sizes: tuple[int, ...], channels: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *sizes, channels, dtype=torch.float64, generator=generator)


def _shard(sizes: tuple[int, ...], dim: int) -> xdist.GridShard:
    return xdist.GridShard(xdist.init_mesh(ring=xdist.rank.read_rank().world_size), sizes, dim)


def moved_and_back(sizes: tuple[int, ...]) -> list[str]:
    """On one rank: what went wrong with switches between any two dims, forward and backward."""
    wrong = []
    x = whole(sizes)
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    for first, second in itertools.product(range(len(sizes)), repeat=2):
        shard = xdist.GridShard(mesh, sizes, first)
        leaf = x.clone().requires_grad_()
        part = shard.scatter(leaf)
        if part.shape[1:-1] != shard.local_sizes:
            wrong.append(f"{first}: {tuple(part.shape)} for {shard.local_sizes}")
        with ledger() as moved, count_c10d_bytes() as counted:
            there, target = shard.switch(part, second)
        from_shares, to_shares = shard.shares, target.shares
        other = x.numel() // sizes[first] // sizes[second]
        if first == second:
            said = 0
        else:
            said = switch_bytes(from_shares, to_shares, shard.rank, other, 8).sent_bytes
        if not moved.sent_bytes == counted.sent_bytes == said:
            wrong.append(f"{first}->{second}: sent {moved.sent_bytes}, formula {said}")
        if target.dim != second or not torch.equal(there, target.scatter(x)):
            wrong.append(f"{first}->{second}: another part")
        if not torch.equal(target.gather(there), x):
            wrong.append(f"{first}->{second}: another whole")
        weight = target.scatter(whole(sizes))
        (there * weight).sum().backward()
        assert leaf.grad is not None
        if not torch.equal(shard.scatter(leaf.grad), shard.scatter(whole(sizes))):
            wrong.append(f"{first}->{second}: another gradient")
    return wrong


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_switches_between_any_two_dims(ranks: int, request: pytest.FixtureRequest) -> None:
    """Four dims, uneven and empty shares; bytes are those of the formula, counted twice."""
    assert moved_and_back(SIZES) == []  # one rank
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for wrong in pool.run(moved_and_back, SIZES):
        assert wrong == []


def flat_order(sizes: tuple[int, ...]) -> bool:
    numbers = torch.arange(torch.Size(sizes).numel()).view(1, *sizes)
    return all(
        torch.equal(shard.scatter(numbers).flatten(), torch.as_tensor(shard.flattened.positions))
        for shard in (_shard(sizes, dim) for dim in range(len(sizes)))
    )


def test_the_flattened_shard_lists_the_tokens_in_local_order(pool3: RankPool) -> None:
    assert pool3.run(flat_order, SIZES) == [True] * 3


def positions_of(sizes: tuple[int, ...]) -> list[str]:
    """On one rank: the global position along each dim of every element of the part, whatever dim
    is sharded, by scattering those of the whole."""
    wrong = []
    for first, dim in itertools.product(range(len(sizes)), repeat=2):
        shard = _shard(sizes, first)
        shape = [-1 if d == dim else 1 for d in range(len(sizes))]
        want = shard.scatter(torch.arange(sizes[dim]).view(1, *shape).expand(1, *sizes))
        got = torch.as_tensor(shard.positions(dim))
        if got.shape != (shard.local_sizes[dim],):
            wrong.append(f"sharded {first}, dim {dim}: {tuple(got.shape)}")
        elif not torch.equal(got.view(shape).expand(shard.local_sizes), want[0]):
            wrong.append(f"sharded {first}, dim {dim}: {got.tolist()}")
    return wrong


def test_positions_are_those_of_the_part(pool3: RankPool) -> None:
    """Every dim, sharded along every dim; a dim of two positions leaves the third rank none."""
    for wrong in pool3.run(positions_of, SIZES):
        assert wrong == []


def windows_of(sizes: tuple[int, ...], dim: int, windows: list[tuple[int, int]]) -> list[str]:
    shard, wrong = _shard(sizes, dim), []
    x = whole(sizes)
    leaf = shard.scatter(x).requires_grad_()
    other = x.numel() // sizes[dim]
    with ledger() as moved, count_c10d_bytes() as counted:
        got = shard.window(leaf, windows)
    start, stop = windows[shard.rank]
    said = window_bytes(shard.layout, windows, shard.rank, other, 8)
    if not moved.sent_bytes == counted.sent_bytes == said.sent_bytes:
        wrong.append(f"sent {moved.sent_bytes}, formula {said.sent_bytes}")
    if moved.received_bytes != said.received_bytes:
        wrong.append(f"received {moved.received_bytes}, formula {said.received_bytes}")
    if not torch.equal(got, x.narrow(dim + 1, start, stop - start)):
        wrong.append("another window")
    weight = whole(sizes)
    with ledger() as moved:
        (got * weight.narrow(dim + 1, start, stop - start)).sum().backward()
    back = said.back(8, sum_itemsize(8))
    if moved.sent_bytes != back.sent_bytes:
        wrong.append(f"back {moved.sent_bytes}, formula {back.sent_bytes}")
    times = torch.zeros(sizes[dim], dtype=torch.float64)
    for low, high in windows:
        times[low:high] += 1
    shape = [1] * x.dim()
    shape[dim + 1] = -1
    assert leaf.grad is not None
    if not torch.allclose(leaf.grad, shard.scatter(weight * times.view(shape)), atol=1e-14):
        wrong.append("another gradient")
    return wrong


@pytest.mark.parametrize("dim", [0, 2])
def test_windows_lie_anywhere(dim: int, pool3: RankPool) -> None:
    """Overlapping, wider than a share, empty, out of order; gradients add up."""
    n = SIZES[dim]
    for windows in ([(0, n)] * 3, [(0, 1), (0, n), (n, n)], [(n - 1, n), (0, 0), (0, 2)]):
        for wrong in pool3.run(windows_of, SIZES, dim, windows):
            assert wrong == [], windows


def resolutions() -> bool:
    """A coarser grid beside a finer one on the same mesh, without another comparison."""
    fine = _shard((8, 6), 0)
    with ledger() as moved:
        coarse = fine.resized((4, 3))
        found = coarse.along(1)
    sizes = fine.sizes_of(fine.rank), coarse.sizes_of(fine.rank)
    same = fine.along(1).resized((4, 3)) == found
    return moved.control_bytes == 0 and same and sizes == (fine.local_sizes, coarse.local_sizes)


def test_several_resolutions_at_once(pool3: RankPool) -> None:
    assert pool3.run(resolutions) == [True] * 3


def other_sizes() -> str:
    try:
        _shard((4, 3 + xdist.rank.read_rank().rank), 0)
    except DesyncError as error:
        return str(error)
    return ""


def test_ranks_with_different_grids_are_told(pool2: RankPool) -> None:
    for said in pool2.run(other_sizes):
        assert "different grids" in said


def test_bad_grids_are_refused_with_the_numbers() -> None:
    mesh = xdist.init_mesh()
    for sizes, dim, words in (
        ((), 0, "at least one dim"),
        ((4, 0), 0, r"\(4, 0\)"),
        ((4, 2.5), 0, "integers"),
        ((4, 3), 2, "dim 2"),
    ):
        with pytest.raises(LayoutError, match=words):
            xdist.GridShard(mesh, sizes, dim)  # type: ignore[arg-type]
    shard = xdist.GridShard(mesh, (4, 3), 0)
    with pytest.raises(ShapeError, match=r"\(3, 4\)"):
        shard.scatter(torch.zeros(1, 3, 4, 2))
    with pytest.raises(ShapeError, match=r"\(4, 3\)"):
        shard.switch(torch.zeros(1, 4, 2, 3), 1)
    with pytest.raises(LayoutError, match="3 sizes for 2 dims"):
        shard.resized((2, 2, 2))
    assert shard.positions(1).tolist() == [0, 1, 2]
