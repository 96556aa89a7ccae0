"""The rows of a grid on one rank, scanned a group at a time, forward and backward.

Where the rows' tokens lie on several ranks, the states of all groups and of both directions travel
in one exchange. Kept for backward: the inputs as they lie in the grid and the states between the
tiles of a row; permuted copies are made for one group at a time, and again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup
from xdist.comm.scan import Scan
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.parallel.first_order import first_order
from xdist.parallel.grid_rows import Group, Rows
from xdist.parallel.recurrence import Recurrence
from xdist.parallel.recurrent_scan import backward_together, forward_together
from xdist.parallel.recurrent_tiles import Share
from xdist.parallel.recurrent_work import KEPT_BYTES, Work


@dataclass(frozen=True)
class RowCall:
    """One direction: its recurrence, and its inputs as places in the distinct tensors."""

    op: Recurrence
    reverse: bool
    inputs: tuple[int | None, ...]
    out: tuple[int, int, torch.dtype]  # heads, value dim, dtype

    def pick(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """This call's inputs."""
        return tuple(None if i is None else tensors[i] for i in self.inputs)


@dataclass(frozen=True)
class RowPlan:
    """Rows of one rank, their tokens' layout over the group, and the calls. whole: which tensors
    have no tokens; shared: which belong to both directions; algorithms: one a call."""

    calls: tuple[RowCall, ...]
    rows: Rows
    layout: Layout
    rank: int
    group: ProcessGroup | None
    whole: frozenset[int]
    shared: frozenset[int]
    algorithms: tuple[str, ...]

    def groups(self) -> list[Group]:
        """Rows worked on at once; as many groups on every rank."""
        return list(self.rows.groups(-(-self.layout.length // self.layout.parts)))

    def share(self, call: RowCall) -> Share:
        return Share(self.layout, Documents.of(None, self.layout.length), self.rank, call.reverse)

    def works(self, tensors: Sequence[Tensor], group: Group) -> list[Work]:
        """Each call on the rows of a group."""
        own = [x if i in self.whole else self.rows.take(x, group) for i, x in enumerate(tensors)]
        found = []
        for call in self.calls:
            share, given = self.share(call), call.pick(own)
            work = Work(call.op, share, given, None, want_final=False)
            tile = call.op.row_tile_tokens(given)
            work.segments = share.segments(tile, at_documents=False)
            found.append(work)
        return found

    def scans(self, works: Sequence[Work]) -> list[Scan]:
        """The exchange of states of each work; works are the calls, group after group."""
        found = []
        for number, work in enumerate(works):
            place = number % len(self.calls)
            share = self.share(self.calls[place])
            found.append(
                Scan(
                    share.scan_layout,
                    self.group,
                    transition=work.op.transition,
                    cu_seqlens=share.scan_documents.cu_seqlens,
                    algorithm=self.algorithms[place],
                    rates=work.op.rates_of(work.inputs),
                )
            )
        return found


def _later_states(work: Work) -> list[Tensor]:
    """The states before each tile but those with which a row starts, which are known."""
    return [work.states[id(tile)] for one in work.segments for tile in one.tiles if not tile.fresh]


def _with_states(work: Work, states: Sequence[Tensor]) -> int:
    """Give a new work the states that `_later_states` took; how many those are."""
    used = 0
    for segment in work.segments:
        for tile in segment.tiles:
            work.states[id(tile)] = work.identity if tile.fresh else states[used]
            used += not tile.fresh
    return used


def _share_room(works: Sequence[Work]) -> None:
    """All works together keep as many prepared tiles as one would."""
    for work in works:
        work.kept.bytes = KEPT_BYTES - KEPT_BYTES // len(works)


class RowScan(torch.autograd.Function):
    """(plan, distinct inputs [B, n, heads, D] in the grid's order) -> outputs [B, n, H, V]."""

    @staticmethod
    def forward(ctx: Any, plan: RowPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
        like = next(x for i, x in enumerate(tensors) if i not in plan.whole)
        outs = [
            torch.empty((*like.shape[:2], heads, width), dtype=dtype, device=like.device)
            for heads, width, dtype in (call.out for call in plan.calls)
        ]
        states: list[Tensor] = []
        if plan.group is None:
            ctx.scans = []
            for group in plan.groups():
                for work, out in zip(plan.works(tensors, group), outs, strict=True):
                    work.start_forward()
                    work.forward_alone()
                    plan.rows.put(out, group, work.out)
                    states += _later_states(work)
        else:
            ctx.scans = _forward_sharded(plan, tensors, outs, states)
        ctx.plan, ctx.inputs = plan, len(tensors)
        ctx.save_for_backward(*tensors, *states)
        return tuple(outs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        plan: RowPlan = ctx.plan
        tensors, states = ctx.saved_tensors[: ctx.inputs], list(ctx.saved_tensors[ctx.inputs :])
        totals = _Gradients(plan, tensors)
        groups = plan.groups()
        if plan.group is None:
            for group in groups:
                works = _restored(plan, tensors, group, states, douts)
                for work in works:
                    work.backward_alone()
                totals.add(group, works)
            return None, *totals.found()
        waiting = [_restored(plan, tensors, group, states, douts) for group in groups]
        together = [work for works in waiting for work in works]
        if together:
            _share_room(together)
            backward_together(together, ctx.scans)
        for group, works in zip(groups, waiting, strict=True):
            totals.add(group, works)
        return None, *totals.found()


def _forward_sharded(
    plan: RowPlan, tensors: Sequence[Tensor], outs: Sequence[Tensor], states: list[Tensor]
) -> list[Scan]:
    """Every group's states in one exchange."""
    groups = plan.groups()
    works = [work for group in groups for work in plan.works(tensors, group)]
    if not works:
        return []
    scans = plan.scans(works)
    _share_room(works)
    forward_together(works, scans)
    for number, work in enumerate(works):
        place, call = divmod(number, len(plan.calls))
        plan.rows.put(outs[call], groups[place], work.out)
        states += _later_states(work)
    return scans


def _restored(
    plan: RowPlan,
    tensors: Sequence[Tensor],
    group: Group,
    states: list[Tensor],
    douts: Sequence[Tensor],
) -> list[Work]:
    """The works of a group as forward left them, ready for backward; takes their states."""
    works = plan.works(tensors, group)
    for call, work, dout in zip(plan.calls, works, douts, strict=True):
        del states[: _with_states(work, states)]
        # The gradients of an input of both directions are added before they are rounded.
        added = [place for place, i in enumerate(call.inputs) if i in plan.shared]
        work.start_backward(plan.rows.take(dout, group), {}, added)
    return works


class _Gradients:
    """The inputs' gradients [B, n, heads, D], filled group by group."""

    def __init__(self, plan: RowPlan, tensors: Sequence[Tensor]) -> None:
        self._plan, self._tensors = plan, tensors
        make = torch.empty_like if plan.groups() else torch.zeros_like
        self._totals = [
            None if i in plan.whole else make(x, memory_format=torch.contiguous_format)
            for i, x in enumerate(tensors)
        ]
        self._whole: dict[int, Tensor] = {}

    def add(self, group: Group, works: Sequence[Work]) -> None:
        """Those of a group's rows; the works' own are let go."""
        parts: dict[int, Tensor] = {}
        for call, work in zip(self._plan.calls, works, strict=True):
            for i, grad in zip(call.inputs, work.grads, strict=True):
                if i is None or grad is None:
                    continue
                into = self._whole if i in self._plan.whole else parts
                into[i] = into[i].add_(grad) if i in into else grad
            work.grads = []
        for i, part in parts.items():
            total = self._totals[i]
            assert total is not None
            self._plan.rows.put(total, group, part)

    def found(self) -> list[Tensor]:
        """The gradient of every tensor, in its dtype."""
        return [
            self._whole[i].to(x.dtype)
            if i in self._whole
            else torch.zeros_like(x)
            if total is None
            else total
            for i, (x, total) in enumerate(zip(self._tensors, self._totals, strict=True))
        ]
