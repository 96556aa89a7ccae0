"""One rank's share of a recurrence: its segments, their runs, and the states at both ends of each.

A run's state may be known when the kernel is called (it is then the kernel's own initial state)
or come late, or belong to a document that starts inside the segment; `through_start` and
`through_end` add what the kernel could not know. Everything is linear, so nothing is approximated.

Shapes: states [B,H,K,V]; per-document states [B,documents,H,K,V] (`initial`, `dfinal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xdist.comm.scan import apply_transition
from xdist.parallel.recurrent_op import Local, RecurrentOp
from xdist.parallel.recurrent_segments import Segment, Segments


def cut(local: Sequence[Tensor | None], at: slice) -> tuple[Tensor | None, ...]:
    """The tokens `at` of every input, as views."""
    return tuple(None if x is None else x[:, at] for x in local)


@dataclass
class Run:
    """One document inside one segment; `at` is relative to the segment.

    `starts`, `ends`: the document does so here. `first`, `last`: among the segment's runs.
    """

    at: slice
    document: int
    starts: bool
    ends: bool
    first: bool
    last: bool
    state: Tensor | None = None  # at its first token; None is zero
    given: bool = False  # `state` was the kernel's initial state
    dstate: Tensor | None = None  # gradient of the state after its last token; None is zero
    asked: bool = False  # `dstate` was the kernel's final gradient


@dataclass
class Part:
    """One segment under way: inputs, runs, and what the kernel saved."""

    segment: Segment
    local: Local
    starts: Tensor | None  # bool [n]: documents that start inside, as the kernel wants them
    runs: list[Run]
    saved: tuple[Tensor, ...] = ()  # the kernel's, beside `local`
    out: Tensor | None = None
    state_out: Tensor | None = None  # the kernel's
    grads: list[Tensor | None] = field(default_factory=list)  # of `local`
    dstate_in: Tensor | None = None  # the kernel's

    def tokens(self, run: Run) -> tuple[Tensor | None, ...]:
        return cut(self.local, run.at)


def parts_of(plan: Segments, local: Local, initial: Tensor | None, every_run: bool) -> list[Part]:
    """The rank's segments, ready to run; states of documents that start here are set.

    Without `every_run` and initial states only the first and the last run are listed: no state of
    those between is asked for, and there may be very many.
    """
    device = next(x for x in local if x is not None).device
    parts = []
    for segment in plan.items:
        starts = plan.starts(segment)
        runs = _runs(plan, segment, every_run or initial is not None)
        for run in runs:
            if run.starts and initial is not None:
                run.state = initial[:, run.document]
        marks = None if starts is None else torch.from_numpy(starts).to(device)
        parts.append(Part(segment, cut(local, segment.tokens), marks, runs))
    return parts


def _runs(plan: Segments, segment: Segment, every_run: bool) -> list[Run]:
    found = [(segment.first, segment.first_document), (segment.last, segment.last_document)]
    if every_run:
        found = plan.runs(segment)
    elif segment.single:
        found = found[:1]
    last = len(found) - 1
    return [
        Run(
            at,
            document,
            starts=number > 0 or not segment.enters,
            ends=number < last or not segment.leaves,
            first=number == 0,
            last=number == last,
        )
        for number, (at, document) in enumerate(found)
    ]


def run_part(op: RecurrentOp, part: Part) -> None:
    """The kernel, from the first run's state as far as it is known."""
    first = part.runs[0]
    first.given = first.state is not None
    part.out, part.state_out, part.saved = op.run(part.local, first.state, part.starts)


def complete(op: RecurrentOp, part: Part) -> None:
    """Add to the outputs what the kernel did not know of the states."""
    assert part.out is not None
    for run in part.runs:
        if run.state is not None and not run.given:
            op.apply_state(part.out[:, run.at], part.tokens(run), run.state)


def end_state(op: RecurrentOp, part: Part, run: Run) -> Tensor:
    """The state after a run's last token."""
    if run.last and (run.state is None or run.given):
        assert part.state_out is not None
        return part.state_out
    found = op.summary(part.tokens(run))
    if run.state is None:
        return found.entry
    return found.entry + apply_transition(op.transition, found.transition, run.state)


def run_part_backward(op: RecurrentOp, part: Part, dout: Tensor) -> None:
    """The kernel's backward, to the last run's gradient as far as it is known."""
    last = part.runs[-1]
    last.asked = last.dstate is not None
    part.grads, part.dstate_in = op.run_backward(
        part.local, part.starts, part.saved, dout, last.dstate
    )


def through_start(op: RecurrentOp, part: Part, run: Run, dout: Tensor) -> None:
    """Gradients through a state that the kernel did not know."""
    if run.state is not None and not run.given:
        op.apply_state_backward(
            cut(part.grads, run.at), part.tokens(run), run.state, dout[:, run.at]
        )


def through_end(op: RecurrentOp, part: Part, run: Run) -> None:
    """Gradients through the state after the run, where the kernel did not know them."""
    if run.dstate is None or (run.asked and (run.given or run.state is None)):
        return
    grads, local = cut(part.grads, run.at), part.tokens(run)
    if not run.asked:
        op.apply_dstate(grads, local, run.dstate)
    if run.state is not None:
        op.apply_both(grads, local, run.state, run.dstate)


def start_gradient(op: RecurrentOp, part: Part, run: Run, dout: Tensor) -> Tensor:
    """Gradient of the state at a run's first token."""
    if run.first:
        assert part.dstate_in is not None
        found = part.dstate_in
    else:
        found = op.adjoint_summary(part.tokens(run), dout[:, run.at])
    if run.dstate is None or (run.first and run.last and run.asked):
        return found
    transition = op.transition_of(part.tokens(run))
    return found + apply_transition(op.transition, transition, run.dstate, transposed=True)


def in_position_order(parts: list[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.segment.start)


def forward_alone(op: RecurrentOp, parts: list[Part]) -> None:
    """Run segments that together are the whole sequence, each from its predecessor's state."""
    carried: Tensor | None = None
    for part in in_position_order(parts):
        if part.segment.enters:
            part.runs[0].state = carried
        run_part(op, part)
        complete(op, part)
        if part.segment.leaves:
            carried = end_state(op, part, part.runs[-1])


def backward_alone(op: RecurrentOp, parts: list[Part], dout: Tensor) -> None:
    """Adjoint of `forward_alone`; the runs' `dstate` hold the gradients of final states."""
    carried: Tensor | None = None
    for part in reversed(in_position_order(parts)):
        own = dout[:, part.segment.tokens]
        if part.segment.leaves:
            part.runs[-1].dstate = carried
        run_part_backward(op, part, own)
        for run in part.runs:
            through_start(op, part, run, own)
            through_end(op, part, run)
        if part.segment.enters:
            carried = start_gradient(op, part, part.runs[0], own)


def initial_gradient(op: RecurrentOp, parts: list[Part], dout: Tensor, dinitial: Tensor) -> None:
    """Add to dinitial [B,documents,H,K,V] the gradients of the states given to the runs."""
    for part in parts:
        own = dout[:, part.segment.tokens]
        for run in part.runs:
            if run.starts:
                dinitial[:, run.document] += start_gradient(op, part, run, own)


def final_states(op: RecurrentOp, parts: list[Part]) -> dict[int, Tensor]:
    """State after each document that ends on this rank."""
    return {
        run.document: end_state(op, part, run) for part in parts for run in part.runs if run.ends
    }


def set_final_gradients(parts: list[Part], dfinal: dict[int, Tensor]) -> None:
    """Hand each run the gradient of its document's final state."""
    for part in parts:
        for run in part.runs:
            if run.ends:
                run.dstate = dfinal.get(run.document)


def joined(parts: list[Tensor | None], empty: Tensor) -> Tensor:
    """The parts after each other along dim 1; `empty` (0 tokens) where there is none."""
    found = [x for x in parts if x is not None]
    if not found:
        return torch.zeros_like(empty)
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def input_gradients(parts: list[Part], inputs: Local) -> list[Tensor | None]:
    """The gradient of every input over all segments."""
    return [
        None if x is None else joined([part.grads[i] for part in parts], x)
        for i, x in enumerate(inputs)
    ]


def keep(ctx: Any, parts: list[Part], inputs: Local, initial: Tensor | None) -> None:
    """Save for backward: the inputs, and per part its kernel's tensors and its entering state."""
    ctx.inputs = len(inputs)
    ctx.counts = [len(part.saved) for part in parts]
    ctx.given = [[run.given for run in part.runs] for part in parts]
    entering = [part.runs[0].state if part.segment.enters else None for part in parts]
    saved = [x for part in parts for x in part.saved]
    ctx.save_for_backward(*inputs, initial, *entering, *saved)


def restore(ctx: Any, plan: Segments, every_run: bool) -> tuple[list[Part], Local, Tensor | None]:
    """The parts as forward left them, without their outputs; the inputs; the initial states."""
    inputs, (initial, *rest) = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
    parts = parts_of(plan, inputs, initial, every_run)
    saved = iter(rest[len(parts) :])
    for part, entering, count, given in zip(parts, rest, ctx.counts, ctx.given, strict=False):
        if part.segment.enters:
            part.runs[0].state = entering
        for run, was in zip(part.runs, given, strict=True):
            run.given = was
        part.saved = tuple(next(saved) for _ in range(count))
    return parts, inputs, initial
