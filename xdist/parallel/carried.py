"""Recurrences and convolutions over one chunk of a sequence, from a state to a state.

What `memory.carry` is to a layer, seen from the public functions: each takes its incoming state
from the carry, computes the chunk as a sequence of one rank, and leaves its state behind.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from xdist.layout import Layout
from xdist.memory.carry import Call, Carry, Journey, NeedsWholeSequence
from xdist.mesh import Mesh
from xdist.parallel import recurrent_call
from xdist.parallel.conv import causal_conv1d
from xdist.parallel.recurrent_scan import ScanRecurrence, ScanRequest
from xdist.parallel.recurrent_tiles import Share
from xdist.parallel.recurrent_work import Work, from_state
from xdist.shard import SequenceShard
from xdist_kernels.autocast import without_autocast

if TYPE_CHECKING:
    from xdist.parallel.recurrent import Request, Result


def _not_forward(name: str, carry: Carry) -> NeedsWholeSequence:
    return NeedsWholeSequence(
        f"{name} of a layer that is given a chunk goes forward, from the carry's state",
        f"at positions [{carry.start}, {carry.stop}) it was given initial_state, "
        "output_final_state or reverse",
        "give the whole share to this layer",
    )


def carried_recurrence(request: Request, carry: Carry) -> Result:
    """What the public function returns for the chunk.

    Raises:
        NeedsWholeSequence: the layer handles states itself, or goes against the sequence.
    """
    if request.initial is not None or request.want_final or request.reverse:
        raise _not_forward(request.name, carry)
    op, inputs = request.op, request.inputs
    share = Share(carry.layout, carry.documents, 0)
    work = Work(op, share, inputs, None, want_final=True)
    through = None if op.transition in ("none", "logsumexp") else work.no_transition()
    journey = Journey(op.transition, op.rates_of(inputs), work.identity, through)
    index, state = carry.take(Call(journey=journey))
    state = work.identity if state is None else state
    if carry.until == index:
        with without_autocast(state):
            carry.put(_advanced(work, carry, state))
    fresh = work.identity.unsqueeze(1).expand(-1, carry.documents.count - 1, *state.shape[1:])
    initial = torch.cat([state.unsqueeze(1), fresh], 1)
    call = recurrent_call.Call(op, share, True, len(inputs))
    scan = ScanRequest((call,), None, "auto")
    out, final = ScanRecurrence.apply(scan, initial.detach(), initial, *inputs)
    carry.put(final[:, -1], out)
    return request.finish(out)


def _advanced(work: Work, carry: Carry, state: Tensor) -> Tensor:
    """The state after the chunk, without outputs; the carry's transition is led on."""
    op, (segment,) = work.op, work.segments
    for tile in segment.tiles[segment.origin :]:
        parts = (
            x if x is None or index in op.whole else tile.take(x)
            for index, x in enumerate(work.inputs)
        )
        prepared = op.prepare(tuple(parts), tile.marks(state.device))
        before = work.identity if tile.fresh and tile.at.start else state
        call = partial(op.summarised, prepared, through=carry.through is not None)
        _, state, own = from_state(call, before, of=op)
        if carry.through is not None:
            assert own is not None
            joined = own @ carry.through if op.transition == "matrix" else own + carry.through
            carry.through = joined
    return state


def carried_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    carry: Carry,
    *,
    activation: str | None,
    plain: bool,
    backend: str = "auto",
) -> Tensor:
    """Outputs of the chunk [B, T, C]; the state is the last W - 1 tokens of x.

    Raises:
        NeedsWholeSequence: not `plain`: it has states of its own, or goes against the sequence.
    """
    if not plain:
        raise _not_forward("causal_conv1d", carry)
    reach = weight.shape[1] - 1
    _, tail = carry.take(Call(reach=reach), x)
    if tail is None:
        tail = x.new_zeros(x.shape[0], reach, x.shape[2])
    extended = torch.cat([tail, x], 1)
    cuts = carry.documents.cu_seqlens
    inner = None if len(cuts) == 2 else [0, *(cut + reach for cut in cuts[1:])]
    length = extended.shape[1]
    shard = SequenceShard(Mesh.one_rank(x.device), Layout.contiguous(length, 1), inner)
    out = causal_conv1d(extended, weight, bias, shard, activation=activation, backend=backend)
    assert isinstance(out, Tensor)
    last = length if inner is None else cuts[-1] - cuts[-2]
    kept = min(reach, last)
    # Tokens of an earlier document are to the next chunk what lies before a sequence: zeros.
    carry.put(pad(extended[:, length - kept :], (0, 0, reach - kept, 0)))
    return out[:, reach:]
