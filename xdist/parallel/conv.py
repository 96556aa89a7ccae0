"""Causal depthwise convolution over a sharded sequence: a halo of W - 1 tokens.

Sharded before and after: x and the output along the sequence, in any layout; weight and bias whole.
Moves: forward, the W - 1 tokens before each segment in position order, from as many ranks as hold
    them, in the dtype of x; backward, their gradients return to the owners in float32 or wider.
Saved for backward: x and the halo.
Must divide: nothing; a segment may be shorter than the convolution.

While the halo travels, every token that lies W - 1 or more inside its segment is computed; on the
way back the halo's gradients leave before the rest of the segment is worked on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xdist.comm.halo import start_halo, start_halo_adjoint
from xdist.errors import ShapeError
from xdist.shard import SequenceShard
from xdist_kernels import conv
from xdist_kernels.errors import KernelError


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shard: SequenceShard,
    *,
    activation: str | None,
) -> Tensor:
    """`xdist.causal_conv1d` with the shard resolved; see there."""
    try:
        conv.check(x, weight, bias, activation)
    except KernelError as error:
        raise ShapeError("causal_conv1d was given arguments that do not fit", str(error)) from error
    if x.shape[1] != shard.local_length:
        raise ShapeError(
            "causal_conv1d needs this rank's share of the sequence",
            f"x has {x.shape[1]} tokens, the shard has {shard.local_length}",
            "pass shard.scatter(x), or the shard this tensor was made for",
        )
    return _CausalConv.apply(_Call(shard, weight.shape[1] - 1, activation), x, weight, bias)


class _Stretch(NamedTuple):
    """Tokens of one segment with what lies before them: the head needs the halo, the rest not."""

    at: slice  # of the local tensor
    into_document: Tensor | None  # [tokens], None where no document starts near


@dataclass(frozen=True)
class _Call:
    """Everything about one call that is no tensor; `reach` is W - 1."""

    shard: SequenceShard
    reach: int
    activation: str | None

    def stretches(self) -> Iterator[tuple[_Stretch, _Stretch]]:
        """Head (the first W - 1 tokens) and rest of each segment."""
        inside = self.shard.document_positions if self.shard.documents.count > 1 else None
        offset = 0
        for start, stop in self.shard.layout.segments(self.shard.rank):
            end = offset + stop - start
            middle = min(offset + self.reach, end)
            head, rest = (
                _Stretch(slice(a, b), None if inside is None else inside[a:b])
                for a, b in ((offset, middle), (middle, end))
            )
            yield head, rest
            offset = end

    def kernel_options(self, stretch: _Stretch, prefix: Tensor, **target: Tensor) -> dict[str, Any]:
        """What the kernel needs beside tensors, and where it writes; a history cut at position 0
        is filled with zeros, which is what lies before a sequence."""
        short = self.reach - prefix.shape[1]
        return {
            "activation": self.activation,
            "prefix": pad(prefix, (0, 0, short, 0)) if short else prefix,
            "into_document": stretch.into_document,
            **target,
        }


class _CausalConv(torch.autograd.Function):
    """(call, x, weight, bias) -> y."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shard = call.shard
        pending = start_halo(x, shard.layout, shard.group, dim=1, before=call.reach)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        stretches = list(call.stretches())
        for head, rest in stretches:
            options = call.kernel_options(rest, x[:, head.at], out=out[:, rest.at])
            conv.causal_conv_forward(x[:, rest.at], weight, bias, **options)
        halos = [halo.before for halo in pending.wait()]
        for (head, _), before in zip(stretches, halos, strict=True):
            options = call.kernel_options(head, before, out=out[:, head.at])
            conv.causal_conv_forward(x[:, head.at], weight, bias, **options)
        ctx.call = call
        ctx.save_for_backward(x, weight, bias, *halos)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *halos = ctx.saved_tensors
        call, shard = ctx.call, ctx.call.shard
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dx = torch.zeros(x.shape, dtype=wide, device=x.device)
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        dbias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=x.device)

        def back(stretch: _Stretch, prefix: Tensor, around: Tensor) -> None:
            """Adds one stretch's gradients; `around` is dx of its tokens and the W - 1 before."""
            own = x[:, stretch.at]
            options = call.kernel_options(stretch, prefix, into=around)
            _, dtaps, dlevel, _ = conv.causal_conv_backward(
                own, weight, bias, dout[:, stretch.at], **options
            )
            dweight.add_(dtaps)
            if dbias is not None and dlevel is not None:
                dbias.add_(dlevel)

        stretches = list(call.stretches())
        pairs = []
        for (head, _), halo in zip(stretches, halos, strict=True):
            own = dx[:, head.at]
            around = own.new_zeros(own.shape[0], call.reach + own.shape[1], own.shape[2])
            back(head, halo, around)
            own += around[:, call.reach :]
            grad = around[:, call.reach - halo.shape[1] : call.reach]
            pairs.append((grad, grad[:, :0]))
        pending = start_halo_adjoint(
            pairs, x, shard.layout, shard.group, dim=1, before=call.reach, into=dx
        )
        for head, rest in stretches:
            # Where there is a rest, the head is W - 1 long: the two lie side by side in dx.
            if rest.at.stop > rest.at.start:
                back(rest, x[:, head.at], dx[:, head.at.start : rest.at.stop])
        dx = pending.wait()
        found_bias = None if dbias is None else dbias.to(weight.dtype)
        return None, dx.to(x.dtype), dweight.to(weight.dtype), found_bias
