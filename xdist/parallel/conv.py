"""Causal depthwise convolution over a sharded sequence: a halo of W - 1 tokens.

Sharded before and after: x and the output along the sequence, in any layout; weight and bias whole.
Moves: forward, the W - 1 tokens before each segment in position order, from as many ranks as hold
    them, in the dtype of x; backward, their gradients return to the owners in float32 or wider.
    Final states: each document's last W - 1 tokens, once to every rank.
Saved for backward: x and the halo.
Must divide: nothing; a segment may be shorter than the convolution.

While the halo travels, every token that lies W - 1 or more inside its segment is computed; on the
way back the halo's gradients leave before the rest of the segment is worked on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xdist.comm.first_order import first_order
from xdist.comm.gather import gather
from xdist.comm.halo import start_halo, start_halo_adjoint
from xdist.cost.conv import final_pieces, tokens_in
from xdist.cost.recurrent import ConvProblem
from xdist.errors import ShapeError
from xdist.layout import Layout
from xdist.parallel.backend import chosen
from xdist.parallel.conv_parts import Stretch, Walk
from xdist.parallel.noted import Noted, notes
from xdist.parallel.recurrent_tiles import Share
from xdist.shard import SequenceShard
from xdist_kernels import conv
from xdist_kernels.autocast import in_given_dtypes
from xdist_kernels.errors import KernelError


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shard: SequenceShard,
    *,
    activation: str | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
    backend = chosen("causal_conv1d", backend, x, lambda: conv.refusal(x, weight, bias, activation))
    noted = notes()
    if noted is not None:
        assert not output_final_state, "nobody plans states of a convolution yet"
        sizes = (x.shape[0], x.shape[2], weight.shape[1], x.element_size())
        noted.append(Noted((ConvProblem(shard.layout, *sizes),)))
        return torch.empty_like(x)
    reach = weight.shape[1] - 1
    initial = _initial(initial_state, x, reach, shard, reverse)
    share = Share(shard.layout, shard.documents, shard.rank, reverse)
    walk = Walk(
        share.scan_layout,
        share.scan_documents,
        shard.rank,
        shard.group,
        reach,
        activation,
        initial is not None,
        _inside(share, shard),
        backend,
    )
    x = _turned(x, shard.layout, shard.rank) if reverse else x
    out = _CausalConv.apply(walk, x, weight, bias, initial)
    out = _turned(out, shard.layout, shard.rank) if reverse else out
    if not output_final_state:
        return out
    final = _final(x, initial, walk)
    final = final.flip(1, 2) if reverse else final
    return out, final if shard.packed else final.squeeze(1)


def _initial(
    initial: Tensor | None, x: Tensor, reach: int, shard: SequenceShard, reverse: bool
) -> Tensor | None:
    """[B, documents of the walk, W - 1, C] in the dtype of x."""
    if initial is None:
        return None
    count = (shard.documents.count,) if shard.packed else ()
    wanted = [x.shape[0], *count, reach, x.shape[2]]
    if list(initial.shape) != wanted:
        axes = "[B, documents, W - 1, C]" if shard.packed else "[B, W - 1, C]"
        raise ShapeError(f"initial_state must be {axes} = {wanted}", f"got {list(initial.shape)}")
    initial = initial.to(x.dtype) if shard.packed else initial.to(x.dtype).unsqueeze(1)
    return initial.flip(1, 2) if reverse else initial


def _inside(share: Share, shard: SequenceShard) -> Tensor | None:
    """Position of each local token in its document, in the order of the walk."""
    if shard.documents.count == 1:
        return None
    if not share.reverse:
        return shard.document_positions

    def made() -> Tensor:
        positions = share.scan_layout.positions(shard.rank)
        inside = torch.from_numpy(positions - share.scan_documents.starts(positions))
        # Kept with the shard, for calls outside inference mode too.
        with torch.inference_mode(False):
            return inside.to(shard.mesh.device)

    return shard.once("positions in documents, reversed", made)


def _turned(x: Tensor, layout: Layout, rank: int) -> Tensor:
    """The tokens of each segment in the other order."""
    parts = x.split([stop - start for start, stop in layout.segments(rank)], 1)
    return torch.cat([x[:, :0], *(part.flip(1) for part in parts)], 1)


def _final(x: Tensor, initial: Tensor | None, walk: Walk) -> Tensor:
    """[B, documents, W - 1, C], on every rank; zeros where a document without an initial state is
    shorter."""
    owned = final_pieces(walk.layout, walk.documents, walk.reach)
    parts = [x[:, p.offset : p.offset + p.stop - p.start] for p in owned[walk.rank]]
    sizes = [tokens_in(pieces) for pieces in owned]
    last = gather(torch.cat([x[:, :0], *parts], 1), walk.group, dim=1, sizes=sizes)
    slots = (walk.documents.count, walk.reach)
    if initial is None:
        initial = x.new_zeros(x.shape[0], *slots, x.shape[2])
    pool = torch.cat([initial.flatten(1, 2), last], 1)
    return pool[:, walk.final_slots(owned).to(x.device)].unflatten(1, slots)


class _Tensors(NamedTuple):
    """Of one call, forward."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None

    def history(self, walk: Walk, one: Stretch, halos: Sequence[Tensor]) -> Tensor:
        """The W - 1 tokens before a stretch, [B, W - 1, C]."""
        if one.follows:
            return self.x[:, one.at.start - walk.reach : one.at.start]
        parts = [halos[one.segment][:, halos[one.segment].shape[1] - one.halo :]]
        if self.initial is not None:
            parts.insert(0, self.initial[:, one.document, slice(*one.initial)])
        found = torch.cat(parts, 1)
        # A history cut at position 0 is filled with zeros, which is what lies before a sequence.
        return pad(found, (0, 0, walk.reach - found.shape[1], 0))


class _CausalConv(torch.autograd.Function):
    """(walk, x, weight, bias, initial states) -> y."""

    @staticmethod
    @in_given_dtypes
    def forward(
        ctx: Any,
        walk: Walk,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
    ) -> Tensor:
        pending = start_halo(x, walk.layout, walk.group, dim=1, before=walk.reach)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        given, stretches = _Tensors(x, weight, bias, initial), walk.stretches()

        def run(one: Stretch, halos: Sequence[Tensor]) -> None:
            conv.kernels(walk.backend).causal_conv_forward(
                x[:, one.at],
                weight,
                bias,
                activation=walk.activation,
                prefix=given.history(walk, one, halos),
                into_document=one.into_document,
                out=out[:, one.at],
            )

        for one in (s for s in stretches if s.follows):
            run(one, ())
        halos = [halo.before for halo in pending.wait()]
        for one in (s for s in stretches if not s.follows):
            run(one, halos)
        ctx.walk = walk
        ctx.save_for_backward(x, weight, bias, initial, *halos)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial, *halos = ctx.saved_tensors
        walk: Walk = ctx.walk
        sums = _Sums(walk, _Tensors(x, weight, bias, initial), halos, dout)
        stretches = walk.stretches()
        for one in (s for s in stretches if not s.follows):
            sums.add_head(one)
        pairs = [(grad, grad[:, :0]) for grad in sums.dhalos]
        pending = start_halo_adjoint(
            pairs, x, walk.layout, walk.group, dim=1, before=walk.reach, into=sums.dx
        )
        for one in (s for s in stretches if s.follows):
            # Its history stands before it in dx.
            sums.add(one, sums.dx[:, one.at.start - walk.reach : one.at.stop])
        dx = pending.wait()
        dweight = sums.dweight.to(weight.dtype)
        dbias, dinitial = (
            None if g is None else g.to(like.dtype)
            for g, like in ((sums.dbias, bias), (sums.dinitial, x))
        )
        return None, dx.to(x.dtype), dweight, dbias, dinitial


class _Sums:
    """Gradients of one call, float32 or wider, to which each stretch adds."""

    def __init__(self, walk: Walk, given: _Tensors, halos: Sequence[Tensor], dout: Tensor) -> None:
        wide = torch.float64 if given.x.dtype == torch.float64 else torch.float32
        self.walk, self.given, self.halos, self.dout = walk, given, halos, dout

        def zeros(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.zeros(x.shape, dtype=wide, device=x.device)

        self.dx = torch.zeros(given.x.shape, dtype=wide, device=given.x.device)
        self.dweight = torch.zeros(given.weight.shape, dtype=wide, device=given.x.device)
        self.dbias, self.dinitial = zeros(given.bias), zeros(given.initial)
        self.dhalos = [self.dx.new_zeros(halo.shape) for halo in halos]

    def add(self, one: Stretch, around: Tensor) -> None:
        """One stretch's gradients; `around` is that of the W - 1 tokens before it and its own."""
        given, walk = self.given, self.walk
        _, dtaps, dlevel, _ = conv.kernels(walk.backend).causal_conv_backward(
            given.x[:, one.at],
            given.weight,
            given.bias,
            self.dout[:, one.at],
            activation=walk.activation,
            prefix=given.history(walk, one, self.halos),
            into_document=one.into_document,
            into=around,
        )
        self.dweight += dtaps
        if self.dbias is not None and dlevel is not None:
            self.dbias += dlevel

    def add_head(self, one: Stretch) -> None:
        """A stretch that reads halo and initial state, whose gradients it adds."""
        reach, own = self.walk.reach, self.dx[:, one.at]
        around = own.new_zeros(own.shape[0], reach + own.shape[1], own.shape[2])
        self.add(one, around)
        own += around[:, reach:]
        dhalo = self.dhalos[one.segment]
        dhalo[:, dhalo.shape[1] - one.halo :] += around[:, reach - one.halo : reach]
        if self.dinitial is not None:
            first, last = one.initial
            self.dinitial[:, one.document, first:last] += around[:, : last - first]
