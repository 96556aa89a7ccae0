"""Bytes that a recurrence and a causal convolution move under each strategy. Pure integers.

Symbols: B batch, H heads of outputs and states, K and V dims of a state, U of an output, T elements
of a transition a head that travel (0 without decay, 1 scalar, K diagonal, K x K matrix), D
documents, N tokens and n of them on this rank, P ranks, h this rank's heads under switch; each
input i has j_i heads of this rank, X_i elements a head and e_i bytes an element; e bytes of an
output's element, w bytes of a state's (float32, or float64 for float64 inputs). Sent by one rank:

    scan    cost/scan.py says what each algorithm sends; gather-and-fold:
            forward   w B H KV x (other ranks with later tokens of its document), and w B H T x
                      (other ranks with tokens of the document that passes through), a segment
            backward  w B H KV x (other ranks with earlier tokens of its document), a segment
    switch  forward   B n sum over others p and inputs i of e_i j_i(p) X_i  +  e B (N-n) h U
            backward  e B n U (H-h)  +  B (N-n) sum over inputs of x_i j_i X_i
                      x_i: w where several ranks share a head of input i, else e_i
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
    sum_itemsize,
    transition_elements,
)
from xdist.cost.scan import choose_algorithm, scan_bytes
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
class TokenInput:
    """An input with tokens, as strategy switch moves it."""

    heads: int
    head_elements: int
    element_bytes: int


@dataclass(frozen=True)
class Problem:
    """One call of a recurrence.

    transition: what travels of M: "none", "scalar", "diagonal", "matrix" or "logsumexp" (nothing).
    out_dim: U.
    """

    layout: Layout
    documents: Documents
    batch: int
    heads: int
    key_dim: int
    value_dim: int
    out_dim: int
    transition: str
    element_bytes: int
    inputs: tuple[TokenInput, ...]
    want_final: bool = False
    reverse: bool = False
    algorithm: str = "auto"

    @property
    def state_bytes(self) -> int:
        """Bytes of one element of a state: 8 with float64 inputs, else 4."""
        return sum_itemsize(self.element_bytes)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(B, H, K, V)."""
        return self.batch, self.heads, self.key_dim, self.value_dim


def linear_problem(
    layout: Layout,
    documents: Documents,
    batch: int,
    value_heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    transition: str,
    element_bytes: int,
    *,
    want_final: bool = False,
    reverse: bool = False,
    algorithm: str = "auto",
) -> Problem:
    """The problem of `xdist.linear_attention`; transition "none", "scalar" or "diagonal"."""
    inputs = [TokenInput(key_heads, key_dim, element_bytes)] * 2
    inputs.append(TokenInput(value_heads, value_dim, element_bytes))
    decay = transition_elements(transition, key_dim)
    if decay:
        inputs.append(TokenInput(value_heads, decay, sum_itemsize(element_bytes)))
    return Problem(
        layout,
        documents,
        batch,
        value_heads,
        key_dim,
        value_dim,
        value_dim,
        transition,
        element_bytes,
        tuple(inputs),
        want_final,
        reverse,
        algorithm,
    )


def _mirrored_problem(problem: Problem) -> tuple[Layout, tuple[int, ...]]:
    """Layout and cu_seqlens in positions of the scan."""
    layout, documents = problem.layout, problem.documents
    if problem.reverse:
        layout, documents = layout.mirrored(), documents.mirrored()
    return layout, documents.cu_seqlens


def _documents_of(problem: Problem, rank: int) -> int:
    cuts = problem.documents.cu_seqlens
    ends = [(a if problem.reverse else b - 1) for a, b in pairwise(cuts) if b > a]
    return sum(problem.layout.owners(end, end + 1)[0].rank == rank for end in ends)


def _scan(problem: Problem, rank: int, backward: bool) -> Moved:
    p = problem
    layout, cuts = _mirrored_problem(p)
    algorithm = p.algorithm
    if algorithm == "auto":
        choice = choose_algorithm(layout, cuts, p.state_shape, p.transition, p.state_bytes)
        algorithm = choice.algorithm
    moved = scan_bytes(
        layout,
        cuts,
        rank,
        p.state_shape,
        p.transition,
        p.state_bytes,
        algorithm=algorithm,
        backward=backward,
    )
    if not p.want_final:
        return moved
    owned = [_documents_of(p, r) for r in range(p.layout.parts)]
    each = p.batch * p.heads * p.key_dim * p.value_dim
    finals = reduce_scatter_bytes if backward else gather_bytes
    return moved + finals(owned, rank, each, p.state_bytes)


def _mirrored(sends: Callable[[int, int], int], ranks: int, rank: int) -> Moved:
    """Bytes of `rank` when rank a sends b `sends(a, b)` bytes."""
    others = [r for r in range(ranks) if r != rank]
    return Moved(sum(sends(rank, r) for r in others), sum(sends(r, rank) for r in others))


def _switch(problem: Problem, rank: int, backward: bool) -> Moved:
    p = problem
    values = split_heads(p.heads, p.layout.parts)
    shares = [shared_heads(values, max(1, p.heads // max(1, x.heads))) for x in p.inputs]
    n = p.layout.local_lengths

    def inputs(holder: int) -> int:
        """Bytes a token of all inputs for the heads of `holder`."""
        total = 0
        for x, share in zip(p.inputs, shares, strict=True):
            each = p.state_bytes if backward and overlaps(share) else x.element_bytes
            total += each * (share[holder][1] - share[holder][0]) * x.head_elements
        return total

    def outputs(holder: int) -> int:
        return p.element_bytes * (values[holder][1] - values[holder][0]) * p.out_dim

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
def choose(*problems: Problem) -> Choice:
    """The strategy that sends fewest bytes, forward and backward, summed over ranks and calls."""
    total = {
        strategy: sum(
            recurrent_bytes(problem, strategy, rank, backward=backward).sent_bytes
            for problem in problems
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
