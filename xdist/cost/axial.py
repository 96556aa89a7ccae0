"""Attention along the sharded dim of a grid: bytes of each way, and the way with the fewest.

switch          every other dim but one stays: inputs leave for another dim and outputs return,
                each (P-1)/P of a local part
ulysses, ring   tokens along the dim are one sequence, every other position a row of the batch
                (cost/attention.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from xdist.cost.attention import attention_cost
from xdist.cost.attention_keys import Problem
from xdist.cost.moves import Moved, switch_bytes
from xdist.documents import Documents
from xdist.errors import StrategyError
from xdist.layout import Layout, even_sizes
from xdist.mask import Mask

AXIAL = ("switch", "ulysses", "ring")
"""The order decides ties."""


@dataclass(frozen=True)
class Axial:
    """One call, as every rank knows it.

    switched: elements of one token that a switch moves there and back: those of q, k, v and of the
    output, or a layer's input and output.
    """

    sizes: tuple[int, ...]
    dim: int
    parts: int
    mask: Mask
    batch: int
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    element_bytes: int
    switched: tuple[int, int]

    @property
    def problem(self) -> Problem:
        """Attention's own, for ulysses and ring."""
        n = self.sizes[self.dim]
        layout, documents = Layout.contiguous(n, self.parts), Documents.of(None, n)
        rows = self.batch * prod(self.sizes) // n
        sizes = (rows, self.heads, self.groups, self.head_dim, self.value_dim, self.element_bytes)
        return Problem(layout, documents, self.mask, layout, documents, False, *sizes)


def axial_switch_bytes(call: Axial, to: int, rank: int) -> Moved:
    """Forward of a switch to dim `to` and back; backward is `.back()`."""
    here = even_sizes(call.sizes[call.dim], call.parts)
    there = even_sizes(call.sizes[to], call.parts)
    rest = prod(call.sizes) // call.sizes[call.dim] // call.sizes[to] * call.batch
    inputs, outputs = (rest * elements for elements in call.switched)
    ahead = switch_bytes(here, there, rank, inputs, call.element_bytes)
    return ahead + switch_bytes(there, here, rank, outputs, call.element_bytes)


def axial_switch_dim(sizes: Sequence[int], dim: int, parts: int) -> int:
    """The dim to switch to in a grid of several: the one with the most even shares, the first of
    equals."""

    def largest(to: int) -> float:
        return max(even_sizes(sizes[to], parts)) / sizes[to]

    others = [other for other in range(len(sizes)) if other != dim]
    return min(others, key=lambda to: (largest(to), to))


def check_axial(sizes: Sequence[int], strategy: str) -> None:
    """Raises StrategyError where there is no such strategy, or no other dim to switch to."""
    if strategy not in ("auto", *AXIAL):
        raise StrategyError(
            f"axial attention has no strategy {strategy!r}", f"it has: auto, {', '.join(AXIAL)}"
        )
    if strategy == "switch" and len(sizes) == 1:
        raise StrategyError(
            "strategy 'switch' cannot serve this call",
            f"the grid {tuple(sizes)} has no other dim to shard",
            "choose ulysses or ring",
        )


def axial_bytes(call: Axial, strategy: str, rank: int) -> int:
    """Sent and received, forward and backward."""
    check_axial(call.sizes, strategy)
    if strategy != "switch":
        return attention_cost(call.problem, strategy, rank).bytes
    to = axial_switch_dim(call.sizes, call.dim, call.parts)
    return 2 * sum(axial_switch_bytes(call, to, rank))


def axial_choice(call: Axial) -> str:
    """The strategy whose busiest rank moves the fewest bytes."""
    usable = AXIAL if len(call.sizes) > 1 else AXIAL[1:]
    busiest = {
        strategy: max(axial_bytes(call, strategy, rank) for rank in range(call.parts))
        for strategy in usable
    }
    return min(usable, key=lambda strategy: (busiest[strategy], AXIAL.index(strategy)))
