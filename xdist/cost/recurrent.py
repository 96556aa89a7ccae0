"""Bytes that a recurrence and a causal convolution move under each strategy. Pure integers.

Symbols: B batch, H value heads, J key heads, K and V head dims, T transition elements a head (0
without decay, 1 scalar, K diagonal), D documents, N tokens and n of them on this rank, P ranks, h
and j this rank's heads under switch (j_p those of rank p), e bytes of an input element, w bytes of
a state's (float32, or float64 for float64 inputs). Sent by one rank:

    scan    forward   w B H KV x (other ranks with later tokens of its document), and w B H T x
                      (other ranks with tokens of the document that passes through), a segment
            backward  w B H KV x (other ranks with earlier tokens of its document), a segment
    switch  forward   B n sum over others p of (e (2 j_p K + h_p V) + w h_p T) + e B (N-n) h V
            backward  e B n V (H-h) + B (N-n) (x 2 j K + e h V + w h T)
                      x: w where several ranks share a key head, else e
    final   scan      w B H KV (P-1) for each document that ends on it; back, w B H KV for each
                      that ends elsewhere
            switch    w B D h KV (P-1); back, w B D (H-h) KV

What a rank receives is what the others send it. Causal convolution: see `conv_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from xdist.cost.moves import (
    Moved,
    gather_bytes,
    halo_bytes,
    reduce_scatter_bytes,
    scan_bytes,
    sum_itemsize,
    transition_elements,
)
from xdist.documents import Documents
from xdist.errors import StrategyError
from xdist.layout import Layout, even_sizes

# The order decides ties: least memory held for backward first.
STRATEGIES = ("scan", "switch")
Shares = tuple[tuple[int, int], ...]  # the range of heads that each rank holds


def split_heads(heads: int, ranks: int) -> Shares:
    """Value heads of each rank: the first `heads mod ranks` hold one more."""
    cuts = [0]
    for size in even_sizes(heads, ranks):
        cuts.append(cuts[-1] + size)
    return tuple((cuts[r], cuts[r + 1]) for r in range(ranks))


def shared_heads(shares: Shares, group: int) -> Shares:
    """Key heads that each rank's value heads use, `group` value heads to a key head."""
    return tuple((a // group, -(-b // group)) if b > a else (0, 0) for a, b in shares)


def overlaps(shares: Shares) -> bool:
    """Whether some head is needed by more than one rank."""
    held = sorted(share for share in shares if share[1] > share[0])
    return any(a[1] > b[0] for a, b in pairwise(held))


@dataclass(frozen=True)
class Problem:
    """One call of linear attention. transition: "none", "scalar" or "diagonal"."""

    layout: Layout
    documents: Documents
    batch: int
    value_heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    transition: str
    element_bytes: int
    want_final: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of one element of a state: 8 with float64 inputs, else 4."""
        return sum_itemsize(self.element_bytes)


def _documents_of(problem: Problem, rank: int) -> int:
    cuts = problem.documents.cu_seqlens
    ends = [b for a, b in pairwise(cuts) if b > a]
    return sum(problem.layout.owners(end - 1, end)[0].rank == rank for end in ends)


def _scan(problem: Problem, rank: int, backward: bool) -> Moved:
    p = problem
    moved = scan_bytes(
        p.layout,
        p.documents.cu_seqlens,
        rank,
        (p.batch, p.value_heads, p.key_dim, p.value_dim),
        p.transition,
        p.state_bytes,
        backward=backward,
    )
    if not p.want_final:
        return moved
    owned = [_documents_of(p, r) for r in range(p.layout.parts)]
    each = p.batch * p.value_heads * p.key_dim * p.value_dim
    finals = reduce_scatter_bytes if backward else gather_bytes
    return moved + finals(owned, rank, each, p.state_bytes)


def _mirrored(sends: Callable[[int, int], int], ranks: int, rank: int) -> Moved:
    """Bytes of `rank` when rank a sends b `sends(a, b)` bytes."""
    others = [r for r in range(ranks) if r != rank]
    return Moved(sum(sends(rank, r) for r in others), sum(sends(r, rank) for r in others))


def _switch(problem: Problem, rank: int, backward: bool) -> Moved:
    p = problem
    values = split_heads(p.value_heads, p.layout.parts)
    keys = shared_heads(values, max(1, p.value_heads // max(1, p.key_heads)))
    key_bytes = p.state_bytes if backward and overlaps(keys) else p.element_bytes
    n = p.layout.local_lengths

    def inputs(holder: int) -> int:
        """Bytes a token of q, k, v and log_decay for the heads of `holder`."""
        h, j = values[holder][1] - values[holder][0], keys[holder][1] - keys[holder][0]
        decay = p.state_bytes * h * transition_elements(p.transition, p.key_dim)
        return key_bytes * 2 * j * p.key_dim + p.element_bytes * h * p.value_dim + decay

    def outputs(holder: int) -> int:
        return p.element_bytes * (values[holder][1] - values[holder][0]) * p.value_dim

    def sends(sender: int, receiver: int) -> int:
        to_heads, to_tokens = (outputs, inputs) if backward else (inputs, outputs)
        total = n[sender] * to_heads(receiver) + n[receiver] * to_tokens(sender)
        total *= p.batch
        if p.want_final:
            start, stop = values[receiver if backward else sender]
            heads = p.documents.count * (stop - start)
            total += p.state_bytes * p.batch * heads * p.key_dim * p.value_dim
        return total

    return _mirrored(sends, p.layout.parts, rank)


def recurrent_bytes(problem: Problem, strategy: str, rank: int, *, backward: bool) -> Moved:
    """Bytes that sequence rank `rank` sends and receives in one direction of one call."""
    if strategy not in STRATEGIES:
        raise StrategyError(f"no such strategy: {strategy!r}", "", f"one of {STRATEGIES}")
    count = _scan if strategy == "scan" else _switch
    return count(problem, rank, backward)


@dataclass(frozen=True)
class Choice:
    """What `auto` chose; `total_bytes` holds what all ranks send, per strategy."""

    strategy: str
    total_bytes: dict[str, int]

    def __str__(self) -> str:
        said = ", ".join(f"{name} {count} bytes" for name, count in self.total_bytes.items())
        return f"{self.strategy} ({said}, forward and backward, all ranks)"


@lru_cache(maxsize=256)
def choose(problem: Problem) -> Choice:
    """The strategy that sends fewest bytes, forward and backward, summed over ranks."""
    total = {
        strategy: sum(
            recurrent_bytes(problem, strategy, rank, backward=backward).sent_bytes
            for rank in range(problem.layout.parts)
            for backward in (False, True)
        )
        for strategy in STRATEGIES
    }
    return Choice(min(STRATEGIES, key=lambda name: total[name]), total)


@dataclass(frozen=True)
class ConvProblem:
    """One call of the causal convolution of `width` taps over x [batch, n, channels]."""

    layout: Layout
    batch: int
    channels: int
    width: int
    element_bytes: int


def conv_bytes(problem: ConvProblem, rank: int, *, backward: bool) -> Moved:
    """Bytes of the halo: width - 1 tokens before each segment, from the ranks that hold them.

    Forward they keep their dtype; backward their gradients travel in float32, or float64 for
    float64, to be added. Received by one rank, forward: e B C x tokens of other ranks in the
    width - 1 positions before each of its segments.
    """
    p = problem
    itemsize = p.element_bytes
    moved = halo_bytes(p.layout, rank, p.width - 1, 0, p.batch * p.channels, itemsize)
    return moved.back(itemsize, sum_itemsize(itemsize)) if backward else moved
