"""Convolution of a grid of one to four dims, channels last, with an explicit backward.

    for each tile of outputs along the first dim:
        y = bias
        for each tap (t1, ..) of all dims but the last two:
            y += conv2d(planes of x that the tap reads, weight[:, :, t1, ..])

Tokens of a grid lie channels last, which is what a CPU's 2-D convolutions want, depthwise ones
above all: nothing is laid out anew, and a tile stays in cache from tap to tap. Products and sums
are in float32, float64 for float64; a narrower tile is widened once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xdist_kernels.errors import KernelError

# Elements of a tile of outputs: 4 MiB in float32.
TILE_ELEMENTS = 1 << 20


class Taps(NamedTuple):
    """How taps step through the grid, one number a dim. `before`: zeros in front of x; those behind
    follow from the number of outputs."""

    before: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Raise KernelError unless x is [B,S1..Sk,C], weight [Cout,C/groups,K1..Kk], bias [Cout]."""
    dims = weight.dim() - 2
    if not x.is_floating_point() or not weight.is_floating_point():
        raise KernelError(f"x and weight must be floating point; got {x.dtype} and {weight.dtype}")
    if not 1 <= dims <= 4 or x.dim() != dims + 2 or 0 in weight.shape:
        raise KernelError(
            "x must be [B,S1..Sk,C] and weight [Cout,C/groups,K1..Kk], k from 1 to 4; got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    channels, out_channels = x.shape[-1], weight.shape[0]
    if groups < 1 or weight.shape[1] * groups != channels or out_channels % groups:
        raise KernelError(
            f"groups must divide both channels, and weight's second dim be C/groups; got {channels}"
            f" channels, {groups} groups and weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(f"bias must be [Cout] = [{out_channels}]; got {tuple(bias.shape)}")


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Taps, *, out: Tensor
) -> Tensor:
    """Fills `out` [B,O1..Ok,Cout], of any strides, from x [B,S1..Sk,C]; returns it."""
    call = _Call(x, weight, out, taps)
    level = torch.zeros(weight.shape[0], dtype=call.wide, device=x.device)
    if bias is not None:
        level += bias
    for tile in call.tiles():
        target = call.out[:, tile.outputs]
        source = call.x[:, tile.inputs].to(call.wide)
        # A tap that reads for all outputs makes the sum to which the others add.
        runs = sorted(call.runs(tile), key=lambda run: not run.whole)
        if runs and runs[0].whole:
            first, *runs = runs
            total = call.outputs(source[first.inputs], first, level)
        else:
            total = level.expand(target.shape).clone()
        for run in runs:
            total[run.outputs] += call.outputs(source[run.inputs], run)
        target.copy_(total)
    return out


def conv_backward(
    x: Tensor,
    weight: Tensor,
    dout: Tensor,
    taps: Taps,
    *,
    into: Tensor | None = None,
    want_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """(dweight, dbias); x's gradient is added to `into` [B,S1..Sk,C] where one is given.

    All are float32, or float64 for float64, since they are added to those of other runs. Without
    want_weight dweight is left zero.
    """
    call = _Call(x, weight, dout, taps)
    target = None if into is None else _canonical(into, weight.dim() - 2)
    dkernels = [torch.zeros_like(kernel) for kernel in call.kernels]
    dbias = torch.zeros(weight.shape[0], dtype=call.wide, device=x.device)
    for tile in call.tiles():
        part = call.out[:, tile.outputs].to(call.wide)
        dbias += part.flatten(0, -2).sum(0)
        if target is None and not want_weight:
            continue
        source = call.x[:, tile.inputs].to(call.wide)
        for run in call.runs(tile):
            mask = (target is not None, want_weight)
            dseen, dkernel = call.gradients(source[run.inputs], part[run.outputs], run, mask)
            if target is not None and dseen is not None:
                target[:, tile.inputs][run.inputs] += dseen
            if dkernel is not None:
                dkernels[run.kernel] += dkernel
    return torch.stack(dkernels, 2).view(weight.shape), dbias


class _Tile(NamedTuple):
    """Outputs of a run of the first dim, and the inputs that they read."""

    outputs: slice
    inputs: slice


class _Run(NamedTuple):
    """One tap of the dims before the last two: which places of a tile read which of its inputs."""

    kernel: int
    outputs: tuple[slice, ...]
    inputs: tuple[slice, ...]
    whole: bool  # all places of the tile


def _canonical(x: Tensor, dims: int) -> Tensor:
    """[B,P1,..,H,W,C] with at least one dim of planes: of one and two dims the batch is that."""
    if dims == 1:
        return x[None, :, :, None]
    return x[None] if dims == 2 else x


class _Call:
    """One call with all dims but the last two as planes of 2-D convolutions."""

    def __init__(self, x: Tensor, weight: Tensor, out: Tensor, taps: Taps) -> None:
        dims = weight.dim() - 2
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.out = _canonical(x, dims), _canonical(out, dims)
        front, behind = (1,) * (dims < 3), (1,) * (dims == 1)
        sizes = (*front, *weight.shape[2:], *behind)
        self.sizes = sizes[:-2]
        kernels = weight.to(self.wide).reshape(*weight.shape[:2], prod(self.sizes), *sizes[-2:])
        self.kernels = [kernel.contiguous() for kernel in kernels.unbind(2)]
        self.stride = (*front, *taps.stride, *behind)
        self.dilation = (*front, *taps.dilation, *behind)
        self.before = (*(0 for _ in front), *taps.before, *(0 for _ in behind))
        self.groups = taps.groups
        self.padding, self.pads = self._padding(sizes)

    def _padding(self, sizes: tuple[int, ...]) -> tuple[tuple[int, int], list[int] | None]:
        """Zeros around a plane: those that a convolution adds itself, or what is to be padded
        (negative: cut) where they differ between the two sides, for `pad`."""
        alike, pads = True, [0, 0]
        for dim in (-1, -2):
            n, outs = self.x.shape[dim - 1], self.out.shape[dim - 1]
            before, stride = self.before[dim], self.stride[dim]
            extent = self.dilation[dim] * (sizes[dim] - 1) + 1
            pads += [before, (outs - 1) * stride + extent - before - n]
            room = n + 2 * before - extent
            alike = alike and room >= 0 and room // stride + 1 == outs
        if alike:
            return (self.before[-2], self.before[-1]), None
        return (0, 0), pads

    def _span(self, dim: int, tap: int, start: int, stop: int) -> tuple[int, int, int]:
        """Of outputs `[start, stop)` along a dim of planes those whose tap lies inside, and the
        first input it reads."""
        shift = tap * self.dilation[dim] - self.before[dim]
        stride, n = self.stride[dim], self.x.shape[dim + 1]
        start = max(start, -(shift // stride))
        return start, min(stop, (n - 1 - shift) // stride + 1), start * stride + shift

    def tiles(self) -> Iterator[_Tile]:
        """All outputs, tile by tile."""
        count = self.out.shape[1]
        if not self.out.numel():
            return
        rows = max(1, TILE_ELEMENTS // (self.out.numel() // count))
        n, stride = self.x.shape[1], self.stride[0]
        reach = self.dilation[0] * (self.sizes[0] - 1) + 1
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            low = start * stride - self.before[0]
            high = (stop - 1) * stride - self.before[0] + reach
            low = min(max(low, 0), n)
            yield _Tile(slice(start, stop), slice(low, max(low, min(high, n))))

    def runs(self, tile: _Tile) -> Iterator[_Run]:
        """One run for each tap that reads any input."""
        if not self.x.numel():
            return
        places = [tile.outputs.stop - tile.outputs.start, *self.out.shape[2:-3]]
        for number, tap in enumerate(product(*(range(size) for size in self.sizes))):
            outputs, inputs = [slice(None)], [slice(None)]
            for dim, t in enumerate(tap):
                first, last = 0, self.out.shape[dim + 1]
                if dim == 0:
                    first, last = tile.outputs.start, tile.outputs.stop
                start, stop, place = self._span(dim, t, first, last)
                place -= tile.inputs.start if dim == 0 else 0
                count = max(0, stop - start)
                outputs.append(slice(start - first, start - first + count))
                step = self.stride[dim]
                inputs.append(slice(place, place + max(0, (count - 1) * step + 1), step))
                if not count:
                    break
            else:
                whole = all(at == slice(0, n) for at, n in zip(outputs[1:], places, strict=True))
                yield _Run(number, tuple(outputs), tuple(inputs), whole)

    def _images(self, seen: Tensor) -> Tensor:
        """[B,..,H,W,C] as channels-last images [N,C,H,W]."""
        planes = seen.flatten(0, -4)
        return (planes if self.pads is None else pad(planes, self.pads)).permute(0, 3, 1, 2)

    def outputs(self, seen: Tensor, run: _Run, bias: Tensor | None = None) -> Tensor:
        """[B,..,O,O',Cout] that one tap adds, from the planes it reads."""
        found = torch.conv2d(
            self._images(seen), self.kernels[run.kernel], bias, self.stride[-2:], self.padding,
            self.dilation[-2:], self.groups,
        )  # fmt: skip
        return found.permute(0, 2, 3, 1).unflatten(0, seen.shape[:-3])

    def gradients(
        self, seen: Tensor, dout: Tensor, run: _Run, mask: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of those planes and of the tap's weight, as `mask` asks for them."""
        dseen, dkernel, _ = torch.ops.aten.convolution_backward(
            dout.flatten(0, -4).permute(0, 3, 1, 2), self._images(seen), self.kernels[run.kernel],
            None, self.stride[-2:], self.padding, self.dilation[-2:], False, (0, 0), self.groups,
            (*mask, False),
        )  # fmt: skip
        if dseen is not None:
            dseen = dseen.permute(0, 2, 3, 1)
            if self.pads is not None:
                dseen = pad(dseen, [-p for p in self.pads])
            dseen = dseen.unflatten(0, seen.shape[:-3])
        return dseen, dkernel
