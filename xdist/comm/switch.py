"""Switch: the sharded dim of a tensor becomes whole, and a whole dim becomes sharded.

Sharded before: `from_dim`; after: `to_dim`. Moves, per rank, to each other rank one block of its
tensor: (P-1)/P of it, forward and backward alike. Saved for backward: nothing; the adjoint is the
switch with the dims swapped. Divides: nothing; shares may be uneven or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist.comm.collectives import (
    ProcessGroup,
    Shape,
    check_member,
    rank_of,
    size_of,
    start_pairs,
)
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.comm.summing import offsets
from xdist.errors import ShapeError
from xdist.layout import even_sizes


class Switch(NamedTuple):
    """From which dim to which, with the size of every rank's share of each."""

    from_dim: int
    to_dim: int
    from_sizes: tuple[int, ...]
    to_sizes: tuple[int, ...]

    def swapped(self) -> Switch:
        """The adjoint: the way back."""
        return Switch(self.to_dim, self.from_dim, self.to_sizes, self.from_sizes)


def plan_switch(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    from_dim: int,
    to_dim: int,
    from_size: int | None = None,
    from_sizes: Sequence[int] | None = None,
    to_sizes: Sequence[int] | None = None,
) -> Switch:
    """The switch of `x`, checked. Shares not given are those of `torch.tensor_split`.

    `from_size` is the whole size of the sharded dim, `from_sizes` each rank's share of it; with
    neither, every rank holds as much as this one.

    Raises:
        ShapeError: the dims are not two dims of x, or the shares do not add up.
    """
    check_member(group)
    size, me = size_of(group), rank_of(group)
    if not (-x.dim() <= from_dim < x.dim() and -x.dim() <= to_dim < x.dim()):
        raise ShapeError(
            "from_dim and to_dim must be dims of x", f"{from_dim}, {to_dim}; x {x.dim()}-d"
        )
    from_dim, to_dim = from_dim % x.dim(), to_dim % x.dim()
    if from_dim == to_dim:
        raise ShapeError("from_dim and to_dim must differ", f"both are {from_dim}")
    if from_sizes is None:
        whole = x.shape[from_dim] * size if from_size is None else from_size
        from_sizes = even_sizes(whole, size)
    if to_sizes is None:
        to_sizes = even_sizes(x.shape[to_dim], size)
    if len(from_sizes) != size or len(to_sizes) != size:
        raise ShapeError(
            "a share for every rank is needed", f"{size} ranks: {from_sizes}, {to_sizes}"
        )
    if x.shape[from_dim] != from_sizes[me] or x.shape[to_dim] != sum(to_sizes):
        raise ShapeError(
            f"x does not hold its share: dim {from_dim} is {x.shape[from_dim]}, dim {to_dim} is "
            f"{x.shape[to_dim]}",
            f"rank {me} should hold {from_sizes[me]} of {from_sizes}, and all of {to_sizes}",
            "pass from_size, the whole size of the sharded dim, when shares are uneven",
        )
    return Switch(from_dim, to_dim, tuple(from_sizes), tuple(to_sizes))


def start_switch_many(
    tensors: Sequence[Tensor], switches: Sequence[Switch], group: ProcessGroup | None
) -> Pending[list[Tensor]]:
    """Switch several tensors in one exchange, each by its own `Switch`; dtypes are kept."""
    if group is None:
        return Pending.done(list(tensors))
    size, me = size_of(group), rank_of(group)
    blocks = {
        r: [_block(x, s, r) for x, s in zip(tensors, switches, strict=True)] for r in range(size)
    }
    specs = {
        r: [(_shape(x, s, r, me), x.dtype) for x, s in zip(tensors, switches, strict=True)]
        for r in range(size)
    }
    own = blocks.pop(me)
    device = tensors[0].device
    pending = start_pairs(
        {r: pack(parts) for r, parts in blocks.items()},
        {r: packed_spec(specs[r]) for r in blocks},
        group,
        move="switch",
        device=device,
    )

    def finish(got: dict[int, Tensor]) -> list[Tensor]:
        parts = {r: unpack(got[r], specs[r]) for r in got} | {me: own}
        return [
            torch.cat([parts[r][i] for r in range(size)], dim=s.from_dim)
            for i, s in enumerate(switches)
        ]

    return pending.then(finish)


def start_switch(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    from_dim: int,
    to_dim: int,
    from_sizes: Sequence[int] | None = None,
    to_sizes: Sequence[int] | None = None,
) -> Pending[Tensor]:
    """Switch one tensor; `from_dim` arrives whole, shares in rank order."""
    plan = plan_switch(
        x, group, from_dim=from_dim, to_dim=to_dim, from_sizes=from_sizes, to_sizes=to_sizes
    )
    return start_switch_many([x], [plan], group).then(lambda found: found[0])


def switch_many(
    tensors: Sequence[Tensor], switches: Sequence[Switch], group: ProcessGroup | None
) -> list[Tensor]:
    """Differentiable `start_switch_many`."""
    return list(_Switch.apply(group, tuple(switches), *tensors))


def switch(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    from_dim: int,
    to_dim: int,
    from_size: int | None = None,
    from_sizes: Sequence[int] | None = None,
    to_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Differentiable `start_switch`."""
    plan = plan_switch(
        x,
        group,
        from_dim=from_dim,
        to_dim=to_dim,
        from_size=from_size,
        from_sizes=from_sizes,
        to_sizes=to_sizes,
    )
    return switch_many([x], [plan], group)[0]


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup | None, switches: tuple[Switch, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.switches = group, switches
        found = start_switch_many(tensors, switches, group).wait()
        return tuple(y.view_as(y) if group is None else y for y in found)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        back = [one.swapped() for one in ctx.switches]
        return None, None, *start_switch_many(grads, back, ctx.group).wait()


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor to send for several: itself if alone, else their bytes, wide dtypes first.

    Wide dtypes first keeps every part aligned inside the buffer.
    """
    if len(tensors) == 1:
        return tensors[0].contiguous()
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    return torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in order])


def packed_spec(specs: Sequence[tuple[Shape, torch.dtype]]) -> tuple[Shape, torch.dtype]:
    """Shape and dtype of `pack` of tensors of these shapes and dtypes."""
    if len(specs) == 1:
        return specs[0]
    return (sum(prod(shape) * dtype.itemsize for shape, dtype in specs),), torch.uint8


def sized(x: Tensor, dim: int, size: int) -> Shape:
    """The shape of x with `size` positions along `dim`."""
    shape = list(x.shape)
    shape[dim] = size
    return tuple(shape)


def unpack(buffer: Tensor, specs: Sequence[tuple[Shape, torch.dtype]]) -> list[Tensor]:
    """The tensors that `pack` put into `buffer`, as views."""
    if len(specs) == 1:
        return [buffer]
    found: dict[int, Tensor] = {}
    start = 0
    for i in sorted(range(len(specs)), key=lambda i: -specs[i][1].itemsize):
        shape, dtype = specs[i]
        stop = start + prod(shape) * dtype.itemsize
        found[i] = buffer[start:stop].view(dtype).view(shape)
        start = stop
    return [found[i] for i in range(len(specs))]


def _block(x: Tensor, plan: Switch, rank: int) -> Tensor:
    return x.narrow(plan.to_dim, offsets(plan.to_sizes)[rank], plan.to_sizes[rank])


def _shape(x: Tensor, plan: Switch, rank: int, me: int) -> Shape:
    shape = list(x.shape)
    shape[plan.from_dim], shape[plan.to_dim] = plan.from_sizes[rank], plan.to_sizes[me]
    return tuple(shape)
