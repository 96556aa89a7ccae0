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
from xdist.comm.first_order import first_order
from xdist.comm.scan import Scan
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.parallel.grid_rows import Group, Rows
from xdist.parallel.recurrence import Recurrence
from xdist.parallel.recurrent_scan import backward_together, forward_together
from xdist.parallel.recurrent_tiles import Share
from xdist.parallel.recurrent_work import Work
from xdist_kernels.autocast import in_given_dtypes


@dataclass(frozen=True)
class RowCall:
    """One direction: its recurrence, and its inputs as places in the distinct tensors."""

    op: Recurrence
    reverse: bool
    inputs: tuple[int | None, ...]
    out: tuple[int, int, torch.dtype]  # heads, value dim, dtype


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

    def work(self, call: RowCall, tensors: Sequence[Tensor], group: Group) -> Work:
        """A call on the rows of a group."""
        given = tuple(
            None
            if i is None
            else tensors[i]
            if i in self.whole
            else self.rows.take(tensors[i], group)
            for i in call.inputs
        )
        share = self.share(call)
        work = Work(call.op, share, given, None, want_final=False)
        work.segments = share.segments(call.op.row_tile_tokens(given), at_documents=False)
        return work

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
        work.kept.bytes = work.kept.room - work.kept.room // len(works)


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.numel() > 0 and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


class RowScan(torch.autograd.Function):
    """(plan, distinct inputs [B, n, heads, D] in the grid's order) -> outputs [B, n, H, V]."""

    @staticmethod
    @in_given_dtypes
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
                for call, out in zip(plan.calls, outs, strict=True):
                    work = plan.work(call, tensors, group)
                    work.start_forward()
                    lent = plan.rows.take(out, group)
                    if _same_memory(lent, out):
                        work.out = lent
                    work.forward_alone()
                    if work.out is not lent:
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
        waiting: list[tuple[Group, RowCall, Work]] = []
        for group in plan.groups():
            for call, dout in zip(plan.calls, douts, strict=True):
                work = _restored(plan, call, tensors, group, states, dout)
                totals.lend(group, call, work)
                if plan.group is None:
                    work.backward_alone()
                    totals.add(group, call, work)
                else:
                    waiting.append((group, call, work))
            if plan.group is None:
                totals.close(group)
        if waiting:
            works = [work for *_, work in waiting]
            _share_room(works)
            backward_together(works, ctx.scans)
            for group, call, work in waiting:
                totals.add(group, call, work)
            for group in plan.groups():
                totals.close(group)
        return None, *totals.found()


def _forward_sharded(
    plan: RowPlan, tensors: Sequence[Tensor], outs: Sequence[Tensor], states: list[Tensor]
) -> list[Scan]:
    """Every group's states in one exchange."""
    places = [(group, number) for group in plan.groups() for number in range(len(plan.calls))]
    works = [plan.work(plan.calls[number], tensors, group) for group, number in places]
    if not works:
        return []
    scans = plan.scans(works)
    _share_room(works)
    forward_together(works, scans)
    for (group, number), work in zip(places, works, strict=True):
        plan.rows.put(outs[number], group, work.out)
        states += _later_states(work)
    return scans


def _restored(
    plan: RowPlan,
    call: RowCall,
    tensors: Sequence[Tensor],
    group: Group,
    states: list[Tensor],
    dout: Tensor,
) -> Work:
    """The work as forward left it, ready for backward; takes its states from the first ones."""
    work = plan.work(call, tensors, group)
    del states[: _with_states(work, states)]
    # The gradients of an input of both directions are added before they are rounded.
    added = [place for place, i in enumerate(call.inputs) if i in plan.shared]
    work.start_backward(plan.rows.take(dout, group), {}, added)
    return work


class _Gradients:
    """The inputs' gradients [B, n, heads, D], filled group by group.

    Where a group's rows are a view of them, the first work writes there itself.
    """

    def __init__(self, plan: RowPlan, tensors: Sequence[Tensor]) -> None:
        self._plan, self._tensors = plan, tensors
        make = torch.empty_like if plan.groups() else torch.zeros_like
        self._totals = {
            i: make(x, memory_format=torch.contiguous_format)
            for i, x in enumerate(tensors)
            if i not in plan.whole
        }
        self._whole: dict[int, Tensor] = {}
        self._parts: dict[str, dict[int, Tensor]] = {}

    def lend(self, group: Group, call: RowCall, work: Work) -> None:
        """Let a work write where the gradients of the group's rows go."""
        work.takes_over = False
        parts = self._parts.setdefault(str(group), {})
        for place, i in enumerate(call.inputs):
            grad = work.grads[place]
            if i is None or grad is None or i in self._plan.whole or i in parts:
                continue
            total = self._totals[i]
            rows = self._plan.rows.take(total, group)
            if grad.dtype == total.dtype and _same_memory(rows, total):
                work.grads[place] = parts[i] = rows

    def add(self, group: Group, call: RowCall, work: Work) -> None:
        """Take over what a work has found; the work is of no use then."""
        parts = self._parts[str(group)]
        grads, work.grads, work.inputs = list(work.grads), [], ()
        work.dout = work.dout[:0]
        for place, i in enumerate(call.inputs):
            grad, grads[place] = grads[place], None
            if i is None or grad is None:
                continue
            into = self._whole if i in self._plan.whole else parts
            if i not in into:
                into[i] = grad
            elif into[i] is not grad:
                into[i].add_(grad)
            if into is parts and i not in self._plan.shared:
                self._write(group, i, parts.pop(i))

    def close(self, group: Group) -> None:
        """Write what lies elsewhere, once both directions are in it."""
        parts = self._parts.pop(str(group))
        for i in list(parts):
            self._write(group, i, parts.pop(i))

    def _write(self, group: Group, i: int, part: Tensor) -> None:
        if not _same_memory(part, self._totals[i]):
            self._plan.rows.put(self._totals[i], group, part)

    def found(self) -> list[Tensor]:
        """The gradient of every tensor, in its dtype."""
        return [
            self._totals[i]
            if i in self._totals
            else self._whole[i].to(x.dtype)
            if i in self._whole
            else torch.zeros_like(x)
            for i, x in enumerate(self._tensors)
        ]
