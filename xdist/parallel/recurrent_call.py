"""What one or several calls of recurrences in one autograd function consist of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xdist.parallel.recurrence import Recurrence
from xdist.parallel.recurrent_tiles import Share
from xdist.parallel.recurrent_work import Work


@dataclass(frozen=True)
class Call:
    """One recurrence on one rank's share: everything about it that is no tensor."""

    op: Recurrence
    share: Share
    want_final: bool
    inputs: int  # how many


@dataclass
class Tensors:
    """The tensors of one call. `starting` is `initial` or identities, and None where no final
    state is wanted; both [B,documents,H,K,V]."""

    starting: Tensor | None
    initial: Tensor | None
    inputs: tuple[Tensor | None, ...]


def split(calls: Sequence[Call], tensors: Sequence[Tensor | None]) -> list[Tensors]:
    """The tensors of each call, from all of them one after another."""
    found, at = [], 0
    for call in calls:
        stop = at + 2 + call.inputs
        found.append(Tensors(tensors[at], tensors[at + 1], tuple(tensors[at + 2 : stop])))
        at = stop
    return found


def keep(ctx: Any, works: Sequence[Work]) -> None:
    """Save for backward: inputs, initial states, and the state before each tile."""
    saved: list[Tensor | None] = []
    ctx.counts = []
    for work in works:
        states = work.kept_states
        ctx.counts.append((len(work.inputs), len(states)))
        saved += [work.initial, *work.inputs, *states]
    ctx.save_for_backward(*saved)


def restore(ctx: Any, calls: Sequence[Call], shares: Sequence[Share]) -> list[Work]:
    """The works as forward left them, without outputs."""
    rest, works = list(ctx.saved_tensors), []
    for call, share, (inputs, states) in zip(calls, shares, ctx.counts, strict=True):
        initial, own, kept = rest[0], rest[1 : 1 + inputs], rest[1 + inputs : 1 + inputs + states]
        rest = rest[1 + inputs + states :]
        works.append(Work(call.op, share, own, initial, want_final=call.want_final, states=kept))
    return works
