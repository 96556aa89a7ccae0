"""Ring: blocks of a sharded dim, each to the ranks that need it; their gradients come back.

Sharded before and after: `dim`. Moves, per rank: forward receives the blocks it needs, and sends
its own once to each rank that needs it; backward a gradient returns for each, in float32 (float64
for float64), added in rank order. Saved for backward: nothing here. Divides: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, Shape, rank_of, size_of, start_pairs
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.comm.summing import add_in_rank_order, sum_dtype
from xdist.comm.switch import sized

# Entry r: the ranks whose block rank r needs (its own may be listed; it costs nothing).
Needs = Sequence[Sequence[int]]


def start_exchange(
    sends: Mapping[int, Tensor],
    receives: Mapping[int, tuple[Shape, torch.dtype]],
    group: ProcessGroup | None,
    *,
    move: str = "ring",
    device: torch.device | None = None,
) -> Pending[dict[int, Tensor]]:
    """One tensor to each rank of `sends`, one of known shape and dtype from each of `receives`."""
    return start_pairs(sends, receives, group, move=move, device=device)


def ring_steps(needs: Needs, rank: int) -> list[tuple[int | None, int | None]]:
    """`rank`'s turns `(to, from)`: in turn k it sends k ranks ahead and receives from k behind.

    None where nobody there needs the block. Turns in which nobody at all moves are left out, the
    same ones on every rank.
    """
    size = len(needs)
    turns: list[tuple[int | None, int | None]] = []
    for step in range(1, size):
        if not any((user - step) % size in needs[user] for user in range(size)):
            continue
        user, owner = (rank + step) % size, (rank - step) % size
        turns.append(
            (user if rank in needs[user] else None, owner if owner in needs[rank] else None)
        )
    return turns


def start_blocks(
    x: Tensor, group: ProcessGroup | None, *, dim: int, sizes: Sequence[int], needs: Needs
) -> Pending[dict[int, Tensor]]:
    """The blocks this rank needs, by owner. `sizes` is each rank's share of `dim`."""
    me = rank_of(group)
    x = x.detach().contiguous()
    sends = {r: x for r in range(size_of(group)) if me in needs[r]}
    receives = {r: (sized(x, dim, sizes[r]), x.dtype) for r in needs[me]}
    return start_pairs(sends, receives, group, move="ring", device=x.device)


def start_blocks_adjoint(
    grads: Mapping[int, Tensor], like: Tensor, group: ProcessGroup | None, *, needs: Needs
) -> Pending[Tensor]:
    """Gradient of this rank's block, shaped as `like`: the sum over the ranks that used it.

    `grads[owner]` is this rank's gradient of each block it needed. float32 (float64 for float64).
    """
    me = rank_of(group)
    wide = sum_dtype(like.dtype)
    users = [r for r in range(size_of(group)) if me in needs[r]]
    spec = (tuple(like.shape), wide)
    pending = start_pairs(
        {owner: grads[owner].detach().to(wide) for owner in needs[me]},
        dict.fromkeys(users, spec),
        group,
        move="ring",
        device=like.device,
    )
    return pending.then(
        lambda got: add_in_rank_order(got) if got else torch.zeros_like(like, dtype=wide)
    )


def blocks(
    x: Tensor, group: ProcessGroup | None, *, dim: int, sizes: Sequence[int], needs: Needs
) -> dict[int, Tensor]:
    """Differentiable `start_blocks`; this rank's own block is always among those returned."""
    wanted = tuple(tuple(dict.fromkeys(owners)) for owners in needs)
    # Every rank's own block is among the outputs, at no cost: a rank that needs no other block
    # still takes part in backward, where its own block's gradients arrive.
    wanted = tuple((*owners, r) if r not in owners else owners for r, owners in enumerate(wanted))
    found = _Blocks.apply(x, group, dim, tuple(sizes), wanted)
    return dict(zip(wanted[rank_of(group)], found, strict=True))


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: ProcessGroup | None,
        dim: int,
        sizes: tuple[int, ...],
        needs: tuple[tuple[int, ...], ...],
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.needs = group, needs
        ctx.shape, ctx.options = x.shape, {"dtype": x.dtype, "device": x.device}
        got = start_blocks(x, group, dim=dim, sizes=sizes, needs=needs).wait()
        return tuple(got[r].view_as(got[r]) for r in needs[rank_of(group)])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        like = torch.empty(ctx.shape, **ctx.options)
        owners = ctx.needs[rank_of(ctx.group)]
        given = dict(zip(owners, grads, strict=True))
        total = start_blocks_adjoint(given, like, ctx.group, needs=ctx.needs).wait()
        return total.to(like.dtype), None, None, None, None
