"""Scan: the state that enters each segment, folded from the summaries of the segments before it.

Sharded before and after: the sequence, by layout. A segment's summary says S_out = M S_in + E.
Moves: forward each segment's E to the ranks that follow in its document, and M, where one document
passes through, to all ranks of that document's segments; backward the adjoint state alone, folded
with M transposed. Independent of the sequence's length; float32 (float64 for float64). Saved for
backward: the transitions received. Divides: nothing; a rank may hold several segments.
Source: the affine scan, for example Martin and Cundy 2018 (arXiv 1709.04057).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, rank_of, size_of, start_pairs
from xdist.comm.pending import Pending
from xdist.comm.summing import sum_dtype
from xdist.cost.moves import ScanRoute, scan_routes
from xdist.errors import ShapeError
from xdist.layout import Layout

Transition = Literal["none", "scalar", "diagonal", "matrix"]


class Scan:
    """The folds of one call: `start` forward, then `start_adjoint` backward if wanted.

    Transitions are None, or one tensor a segment for states `[..., K, V]`: scalar `[...]` and
    diagonal `[..., K]` as logarithms, matrix `[..., K, K]` as it is. `cu_seqlens` cuts the
    sequence into documents, at whose starts the state is zero.
    """

    def __init__(
        self,
        layout: Layout,
        group: ProcessGroup | None,
        *,
        transition: Transition,
        cu_seqlens: Sequence[int] | None = None,
    ) -> None:
        if layout.parts != size_of(group):
            raise ShapeError(
                "the layout is for another number of ranks", f"{layout.parts} and {size_of(group)}"
            )
        self.transition = transition
        self._group, self._me = group, rank_of(group)
        self._routes = scan_routes(layout, (0, layout.length) if cu_seqlens is None else cu_seqlens)
        self._kept: dict[int, Tensor] = {}

    def start(
        self, states: Sequence[Tensor], transitions: Sequence[Tensor] | None, like: Tensor
    ) -> Pending[list[Tensor]]:
        """The state entering each of this rank's segments, in their order.

        `states` and `transitions` are the summaries of this rank's segments; `like` a tensor of a
        state's shape, dtype and device (its values do not count), for ranks without segments.
        """
        like = like.detach().to(sum_dtype(like.dtype))
        known = self._own(states, like)
        if transitions is not None and self.transition != "none":
            self._kept = self._own(transitions, like)
        sizes = self._transition_shape(like)
        loads = []
        for place, route in enumerate(self._routes):
            loads.append((place, route.users, tuple(like.shape), known))
            if self.transition != "none":
                loads.append((place, route.transition_users, sizes, self._kept))
        pending = self._move(loads, like)

        def fold(_: None) -> list[Tensor]:
            state = torch.zeros_like(like)
            entering: dict[int, Tensor] = {}
            for place, route in enumerate(self._routes):
                if not route.enters:
                    state = torch.zeros_like(like)
                if route.piece.rank == self._me:
                    entering[route.piece.number] = state
                if place in known:
                    state = self._through(place, route, state, known[place])
            return [entering[number] for number in sorted(entering)]

        return pending.then(fold)

    def start_adjoint(self, grads: Sequence[Tensor], like: Tensor) -> Pending[list[Tensor]]:
        """The gradient of the state leaving each of this rank's segments.

        `grads` holds, for each segment, the gradient of the state entering it that its own tokens
        cause. Uses the transitions that `start` received; nothing of M crosses again.
        """
        like = like.detach().to(sum_dtype(like.dtype))
        known = self._own(grads, like)
        loads = [
            (place, route.back_users, tuple(like.shape), known)
            for place, route in enumerate(self._routes)
        ]
        pending = self._move(loads, like)

        def fold(_: None) -> list[Tensor]:
            grad = torch.zeros_like(like)
            leaving: dict[int, Tensor] = {}
            for place in reversed(range(len(self._routes))):
                route = self._routes[place]
                if not route.leaves:
                    grad = torch.zeros_like(like)
                if route.piece.rank == self._me:
                    leaving[route.piece.number] = grad
                if place in known:
                    grad = self._through(place, route, grad, known[place], transposed=True)
            return [leaving[number] for number in sorted(leaving)]

        return pending.then(fold)

    def passes(self) -> Tensor:
        """For each of this rank's segments, whether its transition counts; bool `[segments]`."""
        mine = {r.piece.number: r.passes for r in self._routes if r.piece.rank == self._me}
        return torch.tensor([mine[number] for number in sorted(mine)], dtype=torch.bool)

    def _own(self, tensors: Sequence[Tensor], like: Tensor) -> dict[int, Tensor]:
        """This rank's tensors by place in position order."""
        return {
            place: tensors[route.piece.number].detach().to(like.dtype)
            for place, route in enumerate(self._routes)
            if route.piece.rank == self._me
        }

    def _through(
        self, place: int, route: ScanRoute, state: Tensor, add: Tensor, *, transposed: bool = False
    ) -> Tensor:
        """`M state + add`, or `add` alone where a document starts inside or at the segment."""
        if not route.passes:
            return add
        if self.transition != "none" and place not in self._kept:
            # Behind this rank's last segment of the document: nobody here needs the result.
            return add
        return add + apply_transition(
            self.transition, self._kept.get(place), state, transposed=transposed
        )

    def _transition_shape(self, like: Tensor) -> tuple[int, ...]:
        lead, key = tuple(like.shape[:-2]), like.shape[-2]
        return {"none": lead, "scalar": lead, "diagonal": (*lead, key)}.get(
            self.transition, (*lead, key, key)
        )

    def _move(
        self,
        loads: Sequence[tuple[int, tuple[int, ...], tuple[int, ...], dict[int, Tensor]]],
        like: Tensor,
    ) -> Pending[None]:
        """Send each load to its users, one message a pair of ranks; fills the loads' tables."""
        sends: dict[int, list[Tensor]] = {}
        arriving: dict[int, list[tuple[int, tuple[int, ...], dict[int, Tensor]]]] = {}
        for place, users, shape, table in loads:
            owner = self._routes[place].piece.rank
            for user in users:
                if user == owner:
                    continue
                if owner == self._me:
                    sends.setdefault(user, []).append(table[place].reshape(-1))
                elif user == self._me:
                    arriving.setdefault(owner, []).append((place, shape, table))
        specs = {
            owner: ((sum(_count(shape) for _, shape, _ in items),), like.dtype)
            for owner, items in arriving.items()
        }

        def finish(got: dict[int, Tensor]) -> None:
            for owner, items in arriving.items():
                parts = got[owner].split([_count(shape) for _, shape, _ in items])
                for part, (place, shape, table) in zip(parts, items, strict=True):
                    table[place] = part.view(shape)

        return start_pairs(
            {user: torch.cat(parts) for user, parts in sends.items()},
            specs,
            self._group,
            move="scan",
            device=like.device,
        ).then(finish)


def apply_transition(
    kind: Transition, transition: Tensor | None, state: Tensor, *, transposed: bool = False
) -> Tensor:
    """`M state`, or `M^T state`, for a state `[..., K, V]`."""
    if kind == "none" or transition is None:
        return state
    if kind == "scalar":
        return transition.exp()[..., None, None] * state
    if kind == "diagonal":
        return transition.exp()[..., None] * state
    return (transition.mT if transposed else transition) @ state


def scan(
    states: Tensor,
    transitions: Tensor | None,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    transition: Transition,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Differentiable scan: `states` `[segments, ..., K, V]` to the entering states, same shape.

    `transitions` is `[segments, ...]`, `[segments, ..., K]` or `[segments, ..., K, K]`, None for
    transition "none". Gradients reach states and transitions; float32 (float64 for float64).
    """
    plan = Scan(layout, group, transition=transition, cu_seqlens=cu_seqlens)
    return _Scan.apply(plan, states, transitions)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Scan, states: Tensor, transitions: Tensor | None) -> Tensor:
        like = states.new_empty(states.shape[1:])
        given = None if transitions is None else transitions.unbind(0)
        entering = plan.start(states.unbind(0), given, like).wait()
        ctx.plan, ctx.like, ctx.dtype = plan, like, states.dtype
        found = torch.stack(entering) if entering else states.new_empty(states.shape)
        ctx.save_for_backward(found, transitions)
        return found.to(states.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        entering, transitions = ctx.saved_tensors
        plan: Scan = ctx.plan
        leaving = plan.start_adjoint(grad.unbind(0), ctx.like).wait()
        dstates = torch.stack(leaving) if leaving else torch.zeros_like(grad)
        dtransitions = None
        if transitions is not None and plan.transition != "none":
            dtransitions = _transition_gradient(plan.transition, transitions, dstates, entering)
            # A document that starts inside a segment cuts it off from the state before.
            passes = plan.passes().to(dtransitions.device)
            dtransitions[~passes] = 0
        return None, dstates.to(ctx.dtype), dtransitions


def _transition_gradient(
    kind: Transition, transitions: Tensor, leaving: Tensor, entering: Tensor
) -> Tensor:
    """d(M S) for each segment: `dS_out S_in^T`, for logarithms times M on the diagonal."""
    if kind == "matrix":
        return (leaving @ entering.mT).to(transitions.dtype)
    rows = (leaving * entering).sum(-1)
    total = rows.sum(-1) if kind == "scalar" else rows
    return (total * transitions.exp()).to(transitions.dtype)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
