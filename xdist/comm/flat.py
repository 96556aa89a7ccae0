"""Gather and reduce-scatter of flat buffers in even shares: the moves of partitioned parameters.

Engines whose library exchanges parameters and gradients itself hand it these, so that their bytes
stand in the ledger like any other move and a lost peer is named. They are the backend's own
collectives: the shares of a partitioned parameter are even, because the library pads them.

Sharded before and after: a buffer of P shares, whole or one each. Moves, per rank: gather sends
its share to P - 1 ranks; reduce-scatter sends each other rank its share. Saved for backward:
nothing. Must divide: the whole buffer by P.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from xdist.comm.collectives import carrier, naming_lost_peers, rank_of, size_of
from xdist.comm.ledger import record
from xdist.comm.recorder import RECORDER

# The names before torch 2.13, and since.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_flat(whole: Tensor, own: Tensor, group: ProcessGroup, *, move: str) -> None:
    """Fill `whole` [P n] with every rank's `own` [n], in rank order.

    On CUDA with NCCL it is enqueued on the current stream. Raises PeerLost.
    """
    with _counted(move, own, group):
        where = carrier(own.device, group)
        if where != own.device:
            carried = torch.empty(whole.shape, dtype=whole.dtype, device=where)
            _gather(carried, own.to(where), group=group)
            whole.copy_(carried)
        else:
            _gather(whole, own, group=group)


def reduce_scatter_flat(own: Tensor, whole: Tensor, group: ProcessGroup, *, move: str) -> None:
    """Fill `own` [n] with this rank's share of the sum over ranks of `whole` [P n].

    The sum is taken in the dtype given. As for `gather_flat` otherwise.
    """
    with _counted(move, own, group):
        where = carrier(whole.device, group)
        if where != whole.device:
            carried = torch.empty(own.shape, dtype=own.dtype, device=where)
            _reduce_scatter(carried, whole.to(where), op=dist.ReduceOp.SUM, group=group)
            own.copy_(carried)
        else:
            _reduce_scatter(own, whole, op=dist.ReduceOp.SUM, group=group)


@contextmanager
def _counted(move: str, share: Tensor, group: ProcessGroup) -> Iterator[None]:
    """A move in which one share goes to every other rank, and one comes from each."""
    shares = {
        r: (tuple(share.shape), str(share.dtype))
        for r in range(size_of(group))
        if r != rank_of(group)
    }
    noted, _, _ = RECORDER.begin(
        move, group, lambda: dist.get_process_group_ranks(group), shares, shares
    )
    RECORDER.wait(noted)
    with naming_lost_peers(move, group):
        yield
    RECORDER.end(noted)
    moved = share.nbytes * len(shares)
    record(move, moved, moved)
