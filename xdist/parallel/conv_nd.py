"""Convolution of a sharded grid: the edges of each rank's window, moved while the rest is computed.

Sharded before and after: x and the output along the same dim of the grid, each in shares as
    `torch.tensor_split` cuts them; weight and bias whole.
Moves: forward, what this rank's outputs read of other ranks' shares, from as many ranks as hold it,
    in the dtype of x; backward, those gradients return to the owners in float32 or wider.
Saved for backward: x and the edges.
Must divide: nothing; a share may be smaller than the kernel, or empty.

While the edges travel, every output that reads none of them is computed; on the way back the edges'
gradients leave before those outputs are worked on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist.comm.first_order import first_order
from xdist.comm.summing import sum_dtype
from xdist.comm.window_edges import edge_bounds, start_edges, start_edges_adjoint
from xdist.cost.conv_nd import Along, Padding, conv_dims, share_windows
from xdist.cost.per_dim import PerDim, per_dim
from xdist.errors import ShapeError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.parallel.backend import chosen
from xdist_kernels import conv_nd as kernel
from xdist_kernels.autocast import without_autocast
from xdist_kernels.errors import KernelError


def conv_nd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gshard: GridShard | None,
    *,
    stride: PerDim,
    padding: Padding,
    dilation: PerDim,
    groups: int,
    backend: str = "auto",
) -> Tensor:
    """`xdist.conv_nd`; see there."""
    try:
        kernel.check(x, weight, bias, groups)
    except KernelError as error:
        raise ShapeError("conv_nd was given arguments that do not fit", str(error)) from error
    dims = weight.dim() - 2
    gshard = resolve_grid(gshard, x, dims)
    along = conv_dims(
        gshard.sizes, weight.shape[2:], stride=stride, padding=padding, dilation=dilation
    )
    form = kernel.kernels(chosen("conv_nd", backend, x, kernel.refusal))
    call = Call(gshard, along, per_dim("dilation", dilation, dims), groups, form)
    out: Tensor = _ConvNd.apply(call, x, weight, bias)
    return out


class Stretch(NamedTuple):
    """Outputs `[start, stop)` of this rank's share along the sharded dim, counted in the grid, and
    the positions `[low, high)` they read."""

    start: int
    stop: int
    low: int
    high: int


@dataclass(frozen=True)
class Call:
    """Everything about one call that is no tensor."""

    gshard: GridShard
    along: tuple[Along, ...]
    dilation: tuple[int, ...]
    groups: int
    form: ModuleType

    @property
    def dim(self) -> int:
        """The sharded dim of a tensor."""
        return self.gshard.dim + 1

    @property
    def sharded(self) -> Along:
        """The convolution along the sharded dim."""
        return self.along[self.gshard.dim]

    @property
    def target(self) -> GridShard:
        """Where the outputs lie."""
        return self.gshard.resized([one.outputs for one in self.along])

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """What each rank's outputs read."""
        return share_windows(self.sharded, self.gshard.size)

    def stretch(self, start: int, stop: int) -> Stretch:
        return Stretch(start, stop, *self.sharded.window(start, stop))

    def stretches(self) -> tuple[Stretch | None, list[Stretch]]:
        """The outputs that read nothing of another rank, if any, and the others on either side."""
        g, one = self.gshard, self.sharded
        first, last = self.target.start, self.target.stop
        # The first output that reads nothing in front of the share, and one past the last that
        # reads nothing behind it.
        low = first if g.start == 0 else max(first, -(-(g.start + one.front) // one.stride))
        high = last
        if g.stop < one.positions:
            high = min(last, (g.stop + one.front - one.reach) // one.stride + 1)
        inner = self.stretch(low, high)
        # Of zeros alone, and without a share, nothing is inner.
        if low >= high or inner.low == inner.high or g.start == g.stop:
            return None, [self.stretch(first, last)] if first < last else []
        return inner, [self.stretch(a, b) for a, b in ((first, low), (high, last)) if a < b]

    def taps(self, one: Stretch) -> kernel.Taps:
        """How taps step through the inputs of a stretch."""
        before = [each.front for each in self.along]
        start = one.start * self.sharded.stride - self.sharded.front
        before[self.gshard.dim] = max(0, one.low - start)
        strides = tuple(each.stride for each in self.along)
        return kernel.Taps(tuple(before), strides, self.dilation, self.groups)

    def of_output(self, out: Tensor, one: Stretch) -> Tensor:
        """The part of this rank's outputs, or of their gradients, that a stretch is."""
        return out.narrow(self.dim, one.start - self.target.start, one.stop - one.start)


class _Parts(NamedTuple):
    """This rank's share between the edges of its window, with the position each starts at."""

    tensors: tuple[Tensor, ...]
    starts: tuple[int, ...]
    dim: int

    @classmethod
    def of(cls, call: Call, before: Tensor, own: Tensor, after: Tensor) -> _Parts:
        g = call.gshard
        window = call.windows[g.rank]
        (first, _), (last, _) = edge_bounds(g.layout, window, g.rank)
        # A rank without a share has all of its window in front.
        start = g.start if own.shape[call.dim] else window[1]
        return cls((before, own, after), (first, start, last), call.dim)

    def within(self, low: int, high: int) -> list[tuple[int, Tensor]]:
        """Views of what lies in `[low, high)`, in position order, with their places in it."""
        found = []
        for tensor, start in zip(self.tensors, self.starts, strict=True):
            first, last = max(low, start), min(high, start + tensor.shape[self.dim])
            if first < last:
                found.append((first - low, tensor.narrow(self.dim, first - start, last - first)))
        return found

    def take(self, low: int, high: int) -> Tensor:
        """Positions `[low, high)`: a view where one part holds them."""
        found = [part for _, part in self.within(low, high)]
        if len(found) == 1:
            return found[0]
        return torch.cat([self.tensors[1].narrow(self.dim, 0, 0), *found], self.dim)

    def add(self, low: int, grad: Tensor) -> None:
        """Adds the gradient of positions from `low` on to the parts that hold them."""
        for place, part in self.within(low, low + grad.shape[self.dim]):
            part += grad.narrow(self.dim, place, part.shape[self.dim])


class _ConvNd(torch.autograd.Function):
    """(call, x, weight, bias) -> y."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        g = call.gshard
        pending = start_edges(x, g.layout, g.group, dim=call.dim, windows=call.windows)
        out = x.new_empty(x.shape[0], *call.target.local_sizes, weight.shape[0])
        inner, edges = call.stretches()

        def run(one: Stretch, seen: Tensor) -> None:
            target = call.of_output(out, one)
            call.form.conv_forward(seen, weight, bias, call.taps(one), out=target)

        with without_autocast(x):
            if inner is not None:
                run(inner, x.narrow(call.dim, inner.low - g.start, inner.high - inner.low))
            before, after = pending.wait()
            parts = _Parts.of(call, before, x, after)
            for one in edges:
                run(one, parts.take(one.low, one.high))
        ctx.call, ctx.bias = call, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, before, after)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, before, after = ctx.saved_tensors
        sums = _Sums(ctx.call, weight, dout, ctx.needs_input_grad[1:3])
        dx = sums.run(x, before, after)
        dbias = None if ctx.bias is None else sums.dbias.to(ctx.bias)
        return (
            None,
            dx.to(x.dtype) if ctx.needs_input_grad[1] else None,
            sums.dweight.to(weight.dtype) if ctx.needs_input_grad[2] else None,
            dbias if ctx.needs_input_grad[3] else None,
        )


class _Sums:
    """Gradients of one call, float32 or wider, to which each stretch adds."""

    def __init__(self, call: Call, weight: Tensor, dout: Tensor, wanted: Sequence[bool]) -> None:
        self.call, self.weight, self.dout = call, weight, dout
        self.want_x, self.want_weight = wanted
        wide = sum_dtype(dout.dtype)
        self.dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        self.dbias = self.dweight.new_zeros(weight.shape[0])

    def add(self, one: Stretch, seen: Tensor, into: Tensor | None) -> None:
        """One stretch's gradients; x's go into `into`, shaped as what it read."""
        dweight, dbias = self.call.form.conv_backward(
            seen,
            self.weight,
            self.call.of_output(self.dout, one),
            self.call.taps(one),
            into=into,
            want_weight=self.want_weight,
        )
        self.dweight += dweight
        self.dbias += dbias

    def run(self, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """All gradients; returns that of this rank's share."""
        call, g = self.call, self.call.gshard
        inner, edges = call.stretches()
        values = _Parts.of(call, before, x, after)
        dx = torch.zeros(x.shape, dtype=self.dweight.dtype, device=x.device)
        grads = _Parts.of(call, dx.new_zeros(before.shape), dx, dx.new_zeros(after.shape))
        for one in edges:
            seen = values.take(one.low, one.high)
            around = dx.new_zeros(seen.shape)
            self.add(one, seen, around if self.want_x else None)
            grads.add(one.low, around)
        # Whether x needs a gradient is no secret between ranks: all call alike.
        pending = start_edges_adjoint(
            grads.tensors[0], grads.tensors[2], dx, g.layout, g.group, dim=call.dim,
            windows=call.windows,
        ) if self.want_x else None  # fmt: skip
        if inner is not None:
            at = (call.dim, inner.low - g.start, inner.high - inner.low)
            self.add(inner, x.narrow(*at), dx.narrow(*at) if self.want_x else None)
        return dx if pending is None else pending.wait()
