"""Scan: the state that enters each segment, folded from the summaries of the segments before it.

Sharded before and after: the sequence, by layout. A segment's summary says S_out = M S_in + E.
Moves, in float32 (float64 for float64), independent of the sequence's length: gather, forward each
segment's E to the ranks that follow in its document, and M, where one document passes through, to
all ranks of that document's segments; backward adjoint states alone. Chain and pipelined, forward
each state to the next segment's rank and backward each adjoint state to the one before; M never.
Saved for backward: the transitions (of gather also those received). Divides: nothing; a rank may
hold several segments. Backward folds with M transposed.
Source: the affine scan, for example Martin and Cundy 2018 (arXiv 1709.04057).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, rank_of, size_of
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.comm.scan_fold import ChainFold, Direction, Fold, GatherFold, run_together
from xdist.comm.scan_maps import Maps, Transition, apply_transition
from xdist.comm.summing import sum_dtype
from xdist.cost.scan import (
    ScanChoice,
    best_blocks,
    check_algorithm,
    choose_algorithm,
    routes_of,
    schedule,
)
from xdist.errors import ShapeError
from xdist.layout import Layout
from xdist_kernels.autocast import in_given_dtypes

__all__ = [
    "Scan",
    "Transition",
    "apply_transition",
    "scan",
    "start_adjoint_together",
    "start_together",
]


class Scan:
    """The folds of one call: `start` forward, then `start_adjoint` backward if wanted.

    Transitions are None, or one tensor a segment for states `[..., K, V]`: scalar `[...]` and
    diagonal `[..., K]` as logarithms, matrix `[..., K, K]` as it is; with `rates` `[..., K]` and
    diagonal one number a state, `[...]`, whose products with the rates are the logarithms. States
    of logsumexp are `[..., 1, 2 + D]` (comm/scan_maps.py). `cu_seqlens` cuts the sequence into
    documents, at whose starts the state is empty. `algorithm` is gather, chain, pipelined or auto
    (`cost.scan.choose_algorithm`); `blocks` forces the pipelined chain's number of blocks.

    A scan from the sequence's end is one over `layout.mirrored()` and mirrored documents.

    Raises:
        ShapeError: the layout is for another number of ranks; rates without diagonal transitions.
        StrategyError: no such algorithm, or log-sum-exp states pipelined.
    """

    def __init__(
        self,
        layout: Layout,
        group: ProcessGroup | None,
        *,
        transition: Transition,
        cu_seqlens: Sequence[int] | None = None,
        algorithm: str = "gather",
        rates: Tensor | None = None,
        blocks: int | None = None,
    ) -> None:
        if layout.parts != size_of(group):
            raise ShapeError(
                "the layout is for another number of ranks", f"{layout.parts} and {size_of(group)}"
            )
        if rates is not None and transition != "diagonal":
            raise ShapeError("rates belong to diagonal transitions", f"these are {transition!r}")
        check_algorithm(algorithm, transition)
        self.transition = transition
        self.layout, self.group = layout, group
        self._cuts = (0, layout.length) if cu_seqlens is None else tuple(cu_seqlens)
        self._me = rank_of(group)
        self._routes = routes_of(layout, self._cuts)
        self._maps = Maps(transition, None if rates is None else rates.detach())
        self._algorithm, self._blocks = algorithm, blocks
        self._kept: dict[int, Tensor] = {}

    def start(
        self, states: Sequence[Tensor], transitions: Sequence[Tensor] | None, like: Tensor
    ) -> Pending[list[Tensor]]:
        """The state entering each of this rank's segments, in their order.

        `states` and `transitions` are the summaries of this rank's segments; `like` a tensor of a
        state's shape, dtype and device (its values do not count), for ranks without segments.
        """
        return start_together([(self, states, transitions, like)]).then(lambda found: found[0])

    def start_adjoint(self, grads: Sequence[Tensor], like: Tensor) -> Pending[list[Tensor]]:
        """The gradient of the state leaving each of this rank's segments.

        `grads` holds, for each segment, the gradient of the state entering it that its own tokens
        cause. Uses the transitions that `start` had; nothing of M crosses again.
        """
        return start_adjoint_together([(self, grads, like)]).then(lambda found: found[0])

    def passes(self) -> Tensor:
        """For each of this rank's segments, whether its transition counts; bool `[segments]`."""
        mine = {r.piece.number: r.passes for r in self._routes if r.piece.rank == self._me}
        return torch.tensor([mine[number] for number in sorted(mine)], dtype=torch.bool)

    def choice(self, like: Tensor) -> ScanChoice:
        """The algorithm for states like `like`: the one asked for, or that of `auto`."""
        if self._algorithm in ("gather", "chain"):
            return ScanChoice(self._algorithm, 1, {})
        shape, itemsize = tuple(like.shape), sum_dtype(like.dtype).itemsize
        if self._algorithm == "auto":
            return choose_algorithm(
                self.layout,
                self._cuts,
                shape,
                self.transition,
                itemsize,
                rates=self._maps.rates is not None,
            )
        blocks = self._blocks or best_blocks(self.layout, self._cuts, shape, itemsize)
        return ScanChoice("pipelined", max(1, min(blocks, shape[-1])), {})

    def _fold(
        self,
        adds: Sequence[Tensor],
        transitions: Sequence[Tensor] | None,
        like: Tensor,
        *,
        backward: bool,
    ) -> Fold:
        if not backward:
            self._kept = self._own(transitions or (), like) if self._maps.have_transitions else {}
        way = Direction(
            self._routes,
            self._me,
            self._maps,
            backward,
            self._own(adds, like),
            self._kept,
            like,
        )
        if self.group is None:
            return GatherFold(way, ())
        choice = self.choice(like)
        parcels = schedule(
            self.layout,
            self._cuts,
            choice.algorithm,
            blocks=choice.blocks,
            transitions=self._maps.have_transitions,
            backward=backward,
            rank=self._me,
        )
        if choice.algorithm == "gather":
            return GatherFold(way, parcels)
        return ChainFold(way, parcels, choice.blocks)

    def _own(self, tensors: Sequence[Tensor], like: Tensor) -> dict[int, Tensor]:
        """This rank's tensors by place in position order."""
        mine = [(p, r.piece.number) for p, r in enumerate(self._routes) if r.piece.rank == self._me]
        if len(mine) != len(tensors):
            raise ShapeError(
                "a scan takes one summary for each segment of this rank",
                f"{len(mine)} segments, {len(tensors)} tensors",
            )
        return {place: tensors[number].detach().to(like.dtype) for place, number in mine}


def start_together(
    requests: Sequence[tuple[Scan, Sequence[Tensor], Sequence[Tensor] | None, Tensor]],
) -> Pending[list[list[Tensor]]]:
    """Several scans in one exchange: (scan, states, transitions, like) each, as in `Scan.start`.

    In each round there is one message for each pair of ranks, whatever the number of scans.

    Raises:
        ShapeError: no requests, or their groups or dtypes differ.
    """
    likes = _likes([like for *_, like in requests], [scan for scan, *_ in requests])
    folds = [
        scan._fold(states, transitions, like, backward=False)
        for (scan, states, transitions, _), like in zip(requests, likes, strict=True)
    ]
    return run_together(folds, requests[0][0].group, likes[0])


def start_adjoint_together(
    requests: Sequence[tuple[Scan, Sequence[Tensor], Tensor]],
) -> Pending[list[list[Tensor]]]:
    """The backward direction of several scans in one exchange: (scan, grads, like) each."""
    likes = _likes([like for *_, like in requests], [scan for scan, *_ in requests])
    folds = [
        scan._fold(grads, None, like, backward=True)
        for (scan, grads, _), like in zip(requests, likes, strict=True)
    ]
    return run_together(folds, requests[0][0].group, likes[0])


def _likes(likes: Sequence[Tensor], scans: Sequence[Scan]) -> list[Tensor]:
    """States' shapes in the dtype of sums, checked to travel together."""
    found = [like.detach().to(sum_dtype(like.dtype)) for like in likes]
    kinds = {(like.dtype, like.device) for like in found}
    if len(kinds) != 1 or any(scan.group is not scans[0].group for scan in scans):
        raise ShapeError(
            "scans that travel together need one group, dtype and device",
            f"{len(scans)} scans with {sorted(map(str, kinds))}",
        )
    return found


def scan(
    states: Tensor,
    transitions: Tensor | None,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    transition: Transition,
    cu_seqlens: Sequence[int] | None = None,
    algorithm: str = "gather",
) -> Tensor:
    """Differentiable scan: `states` `[segments, ..., K, V]` to the entering states, same shape.

    `transitions` is `[segments, ...]`, `[segments, ..., K]` or `[segments, ..., K, K]`, None for
    transitions none and logsumexp. Gradients reach states and transitions; float32 (float64 for
    float64). With logsumexp they are those of functions of the sums that the states stand for
    (u e^m and w e^m), which is what losses of normalised results are.
    """
    plan = Scan(layout, group, transition=transition, cu_seqlens=cu_seqlens, algorithm=algorithm)
    return _Scan.apply(plan, states, transitions)


class _Scan(torch.autograd.Function):
    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, plan: Scan, states: Tensor, transitions: Tensor | None) -> Tensor:
        like = states.new_empty(states.shape[1:])
        given = None if transitions is None else transitions.unbind(0)
        entering = plan.start(states.unbind(0), given, like).wait()
        ctx.plan, ctx.like, ctx.dtype = plan, like, states.dtype
        found = torch.stack(entering) if entering else states.new_empty(states.shape)
        merged = states.detach() if plan.transition == "logsumexp" else None
        ctx.save_for_backward(found, transitions, merged)
        return found.to(states.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        entering, transitions, merged = ctx.saved_tensors
        plan: Scan = ctx.plan
        asked = grad if merged is None else _merged_adjoint(entering, grad)
        leaving = plan.start_adjoint(asked.unbind(0), ctx.like).wait()
        dstates = torch.stack(leaving) if leaving else torch.zeros_like(grad)
        if merged is not None:
            return None, _merged_gradient(merged, dstates).to(ctx.dtype), None
        dtransitions = None
        if transitions is not None and plan.transition != "none":
            dtransitions = _transition_gradient(plan.transition, transitions, dstates, entering)
            # A document that starts inside a segment cuts it off from the state before.
            passes = plan.passes().to(dtransitions.device)
            dtransitions[~passes] = 0
        return None, dstates.to(ctx.dtype), dtransitions


def _merged_adjoint(entering: Tensor, grad: Tensor) -> Tensor:
    """Adjoint states (exponent, h, G) of the gradients of entering states (m, u, w).

    d(u e^m) = du e^-m, so the exponent is -m; an empty state asks for nothing.
    """
    held = entering[..., :1] > -torch.inf
    return torch.where(
        held.expand_as(grad),
        torch.cat((-entering[..., :1], grad[..., 1:]), dim=-1),
        Maps("logsumexp").empty(grad),
    )


def _merged_gradient(states: Tensor, leaving: Tensor) -> Tensor:
    """Gradient of (m, u, w) from the adjoint (exponent, h, G) of the sums u e^m and w e^m."""
    # The exponent is at most -m of a state that holds this one: the power does not overflow.
    power = leaving[..., :1] + states[..., :1]
    dsums = power.exp() * leaving[..., 1:]
    dm = (dsums * states[..., 1:]).sum(-1, keepdim=True)
    return torch.cat((dm, dsums), dim=-1)


def _transition_gradient(
    kind: Transition, transitions: Tensor, leaving: Tensor, entering: Tensor
) -> Tensor:
    """d(M S) for each segment: `dS_out S_in^T`, for logarithms times M on the diagonal."""
    if kind == "matrix":
        return (leaving @ entering.mT).to(transitions.dtype)
    rows = (leaving * entering).sum(-1)
    total = rows.sum(-1) if kind == "scalar" else rows
    return (total * transitions.exp()).to(transitions.dtype)
