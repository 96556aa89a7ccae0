"""Bytes that a recurrence and a causal convolution move under each strategy. Pure integers.

Symbols: B batch, H value heads, J key heads, K and V head dims, T transition elements a head (0
without decay, 1 scalar, K diagonal), D documents, N tokens and n of them on this rank, P ranks, h
and j this rank's heads under switch (j_p those of rank p), e bytes of an input element, w bytes of
a state's (float32, or float64 for float64 inputs). Sent by one rank:

    scan    forward   w B H (KV + T) (P-1) for each of its segments whose document goes on; the T
                      only where one document fills the segment and began before it
            backward  w B H KV (P-1) for each of its segments whose document began before it
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

from xdist.documents import Documents
from xdist.errors import StrategyError
from xdist.layout import Layout, Piece, even_sizes

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
    """One call of linear attention. transition: elements of M a head, 0, 1 or key_dim."""

    layout: Layout
    documents: Documents
    batch: int
    value_heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    transition: int
    element_bytes: int
    want_final: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of one element of a state: 8 with float64 inputs, else 4."""
        return max(4, self.element_bytes)

    @property
    def state(self) -> int:
        """Bytes of all heads' states at one place: w B H K V."""
        return self.state_bytes * self.batch * self.value_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank and one direction of a call."""

    sent_bytes: int
    received_bytes: int


def _mirrored(sends: Callable[[int, int], int], ranks: int, rank: int) -> Traffic:
    """Traffic of `rank` when rank a sends b `sends(a, b)` bytes."""
    others = [r for r in range(ranks) if r != rank]
    return Traffic(sum(sends(rank, r) for r in others), sum(sends(r, rank) for r in others))


def goes_on(problem: Problem, piece: Piece) -> bool:
    """Whether the document of the piece's last token has tokens after it."""
    return problem.documents.continues(piece.stop)


def began_before(problem: Problem, piece: Piece) -> bool:
    """Whether the document of the piece's first token has tokens before it."""
    return problem.documents.continues(piece.start)


def passes_through(problem: Problem, piece: Piece) -> bool:
    """Whether one document fills the piece and reaches beyond it on both sides."""
    whole = int(problem.documents.starts(piece.stop - 1)) < piece.start
    return whole and goes_on(problem, piece)


def _scan_forward(problem: Problem, sender: int, receiver: int) -> int:
    matrix = problem.key_dim * problem.value_dim
    unit = problem.state_bytes * problem.batch * problem.value_heads
    pieces = [p for p in problem.layout.pieces if p.rank == sender and goes_on(problem, p)]
    through = sum(passes_through(problem, p) for p in pieces)
    return unit * (len(pieces) * matrix + through * problem.transition)


def _scan_backward(problem: Problem, sender: int, receiver: int) -> int:
    pieces = (p for p in problem.layout.pieces if p.rank == sender)
    return problem.state * sum(began_before(problem, p) for p in pieces)


def _documents_of(problem: Problem, rank: int) -> int:
    cuts = problem.documents.cu_seqlens
    ends = [b for a, b in pairwise(cuts) if b > a]
    return sum(problem.layout.owners(end - 1, end)[0].rank == rank for end in ends)


def _scan(problem: Problem, rank: int, backward: bool) -> Traffic:
    def sends(sender: int, receiver: int) -> int:
        states = _scan_backward if backward else _scan_forward
        total = states(problem, sender, receiver)
        if problem.want_final:
            owner = receiver if backward else sender
            total += problem.state * _documents_of(problem, owner)
        return total

    return _mirrored(sends, problem.layout.parts, rank)


def _switch(problem: Problem, rank: int, backward: bool) -> Traffic:
    p = problem
    values = split_heads(p.value_heads, p.layout.parts)
    keys = shared_heads(values, max(1, p.value_heads // max(1, p.key_heads)))
    key_bytes = p.state_bytes if backward and overlaps(keys) else p.element_bytes
    n = p.layout.local_lengths

    def inputs(holder: int) -> int:
        """Bytes a token of q, k, v and log_decay for the heads of `holder`."""
        h, j = values[holder][1] - values[holder][0], keys[holder][1] - keys[holder][0]
        decay = p.state_bytes * h * p.transition
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


def recurrent_bytes(problem: Problem, strategy: str, rank: int, *, backward: bool) -> Traffic:
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


def conv_bytes(problem: ConvProblem, rank: int, *, backward: bool) -> Traffic:
    """Bytes of the halo: width - 1 tokens before each segment, from the ranks that hold them.

    Forward they keep their dtype; backward their gradients travel in float32, or float64 for
    float64, to be added. Received by one rank, forward: e B C x tokens of other ranks in the
    width - 1 positions before each of its segments.
    """
    layout, reach = problem.layout, problem.width - 1
    token = problem.batch * problem.channels * problem.element_bytes
    if backward:
        token = token // problem.element_bytes * max(4, problem.element_bytes)

    def halo(holder: int, owner: int) -> int:
        """Tokens of `owner` before segments of `holder`."""
        return sum(
            part.stop - part.start
            for piece in layout.pieces
            if piece.rank == holder
            for part in layout.owners(max(0, piece.start - reach), piece.start)
            if part.rank == owner
        )

    def sends(sender: int, receiver: int) -> int:
        pair = (sender, receiver) if backward else (receiver, sender)
        return token * halo(*pair)

    return _mirrored(sends, layout.parts, rank)
