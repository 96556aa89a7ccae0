"""The dispatch mode sees what the ledger sees: inside custom ops, in backward, and torch's own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import xdist
from xdist import comm
from xdist.testing import RankPool, count_c10d_bytes


def _inside_a_custom_op() -> tuple[int, int, int]:
    mesh = xdist.init_mesh(ring=2, device="cpu")

    @torch.library.custom_op("xdist_test::whole", mutates_args=())
    def whole(x: Tensor) -> Tensor:
        return comm.start_gather(x, mesh.sequence_group, dim=0, sizes=[3, 3]).wait()

    with comm.ledger() as moved, count_c10d_bytes() as counted:
        assert whole(torch.ones(3)).shape == (6,)
    return moved.sent_bytes, counted.sent_bytes, counted.received_bytes


def test_traffic_inside_a_custom_op_is_counted(pool2: RankPool) -> None:
    assert pool2.run(_inside_a_custom_op) == [(12, 12, 12)] * 2


def _torch_collectives() -> list[tuple[str, int, int]]:
    mesh = xdist.init_mesh(ring=3, device="cpu")
    me, group = mesh.sequence_rank, mesh.sequence_group
    x = torch.ones(6)
    calls = {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "broadcast": lambda: dist.broadcast(x, 0, group=group),
        "all_gather": lambda: dist.all_gather([torch.empty(6) for _ in range(3)], x, group=group),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(6), x, group=group),
        "uneven": lambda: dist.all_to_all_single(
            torch.empty(3 * (me + 1)), x, [me + 1] * 3, [1, 2, 3], group=group
        ),
    }
    found = []
    for name, call in calls.items():
        with count_c10d_bytes() as counted:
            call()
        found.append((name, counted.sent_bytes, counted.received_bytes))
    return found


def test_torchs_own_collectives_count_by_the_same_convention(pool3: RankPool) -> None:
    for rank, found in enumerate(pool3.run(_torch_collectives)):
        assert found == [
            ("all_reduce", 32, 32),
            ("broadcast", 48, 0) if rank == 0 else ("broadcast", 0, 24),
            ("all_gather", 48, 48),
            ("all_to_all", 16, 16),
            ("uneven", 4 * (6 - (rank + 1)), 8 * (rank + 1)),
        ]


def _rank_order() -> bool:
    """float32 sums that depend on their order: all ranks hold the same bits, lowest rank first."""
    mesh = xdist.init_mesh(ring=3, device="cpu")
    parts = [torch.tensor([1e8, 1.0]), torch.tensor([-1e8, 1e8]), torch.tensor([1.0, -1e8])]
    got = comm.start_reduce(parts[mesh.sequence_rank], mesh.sequence_group).wait()
    return torch.equal(got, (parts[0] + parts[1]) + parts[2])


def test_sums_are_added_in_rank_order(pool3: RankPool) -> None:
    assert all(pool3.run(_rank_order))
