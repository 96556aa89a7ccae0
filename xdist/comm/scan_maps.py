"""What a run of tokens does to a state: the map of each kind of transition, and how maps add up.

States are `[..., K, V]`. With transitions none, scalar, diagonal and matrix the map is
`S -> M S + E` and states start from zero. With log-sum-exp a state `[..., 1, 2 + D]` stands for
two sums over tokens of score s and value v: (m, u, w) with u = sum e^(s - m) and
w = sum e^(s - m) v, `[D]`. Maps then merge: both sums are brought to the larger exponent and
added, and the empty state is (-inf, 0, 0). Adjoint states merge in the same way.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Transition = Literal["none", "scalar", "diagonal", "matrix", "logsumexp"]


def apply_transition(
    kind: Transition, transition: Tensor | None, state: Tensor, *, transposed: bool = False
) -> Tensor:
    """`M state`, or `M^T state`, for a state `[..., K, V]`."""
    if kind in ("none", "logsumexp") or transition is None:
        return state
    if kind == "scalar":
        return transition.exp()[..., None, None] * state
    if kind == "diagonal":
        return transition.exp()[..., None] * state
    return (transition.mT if transposed else transition) @ state


def merge_exponents(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two log-sum-exp states `[..., 2 + D]`; of two empty ones the empty one.

    Source: the online softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867).
    """
    top = torch.maximum(first[..., :1], second[..., :1])
    # Against the larger exponent; where both are empty, against 0: exp(-inf) is 0, never NaN.
    base = torch.where(top == -torch.inf, 0.0, top)
    one, two = ((part[..., :1] - base).exp() * part[..., 1:] for part in (first, second))
    return torch.cat((top, one + two), dim=-1)


class Maps:
    """The maps of one scan. `rates` `[..., K]` turns a log number a state into K logarithms."""

    def __init__(self, kind: Transition, rates: Tensor | None = None) -> None:
        self.kind, self.rates = kind, rates

    @property
    def have_transitions(self) -> bool:
        """Whether a segment has a transition."""
        return self.kind in ("scalar", "diagonal", "matrix")

    def empty(self, like: Tensor) -> Tensor:
        """The state before a document's first token."""
        state = torch.zeros_like(like)
        if self.kind == "logsumexp":
            state[..., 0] = -torch.inf
        return state

    def transition_shape(self, like: Tensor) -> tuple[int, ...]:
        """Shape of a segment's transition as it is given and travels."""
        lead, key = tuple(like.shape[:-2]), like.shape[-2]
        if self.kind == "scalar" or self.rates is not None:
            return lead
        return (*lead, key) if self.kind == "diagonal" else (*lead, key, key)

    def advance(
        self, state: Tensor, transition: Tensor | None, add: Tensor, *, transposed: bool = False
    ) -> Tensor:
        """`M state + add`, or `M^T state + add`, or two merged log-sum-exp states."""
        if self.kind == "logsumexp":
            return merge_exponents(state, add)
        if self.rates is not None and transition is not None:
            transition = transition[..., None] * self.rates.to(transition)
        return add + apply_transition(self.kind, transition, state, transposed=transposed)
