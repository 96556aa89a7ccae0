"""Bytes that a training step of the hybrid model moves, from pure integers.

One pass (forward and backward of one micro-step) makes, in this order:

    embedding   halo of the tokens (int64), forward only
    linear      halo of the layer's input and scan of its state, forward and backward
    attention   halo of the layer's input, forward and backward
    loss        reduce of one float64

and a step adds one reduce of four float64 (valid tokens, bad rows, failures, stop) and one reduce
of all gradients over data x sequence. Clipping sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from xdist.config import Config, Model
from xdist.layout import Layout, even_sizes
from xdist.plan.result import Moves, Traffic

TOKEN_BYTES = 8  # int64
SUM_BYTES = 8  # losses and counts are added in float64
STEP_NUMBERS = 4

# Bytes that one rank sends another in one exchange.
Pairs = Callable[[int, int], int]


@dataclass(frozen=True)
class Pass:
    """One micro-step on the ranks of one sequence: rows of the batch, layout, element size."""

    model: Model
    layout: Layout
    rows: int
    element_bytes: int


def layout_of(config: Config, length: int, parts: int) -> Layout:
    """The layout that the config names, over `parts` sequence ranks."""
    if config.parallel.layout == "zigzag":
        return Layout.zigzag(length, parts)
    return Layout.contiguous(length, parts)


def pass_moves(one: Pass, rank: int) -> Moves:
    """What sequence rank `rank` moves in one pass, without the loss."""
    total: Moves = {}
    for move, pairs in _exchanges(one):
        add(total, move, _of(pairs, rank, one.layout.parts))
    return total


def reduce_traffic(count: int, element_bytes: int, ranks: int, rank: int) -> Traffic:
    """A sum over ranks: each share goes to the rank that adds it up, and the sums to all."""
    own = even_sizes(count, ranks)[rank]
    # Its part of every other share, then its own share summed, to everybody; received the same.
    both = element_bytes * (count - own + (ranks - 1) * own)
    return Traffic(both, both)


def add(moves: Moves, move: str, traffic: Traffic) -> None:
    """Adds to one move of `moves`; a rank that neither sends nor receives has no entry."""
    if traffic.sent_bytes or traffic.received_bytes:
        moves[move] = moves.get(move, Traffic()) + traffic


def _exchanges(one: Pass) -> Iterator[tuple[str, Pairs]]:
    """Every exchange of one pass, forward then backward, with its move's name."""
    model = one.model
    channel_bytes = one.element_bytes * model.dim
    orders = max(model.ngram_orders, default=1)
    yield "halo", _halo(one, orders - 1, TOKEN_BYTES)
    for kind in model.layers:
        width = model.conv_width - 1 if kind == "linear" else model.window or 0
        edges = _halo(one, width, channel_bytes)
        yield "halo", edges
        yield "halo", _reversed(edges)
        if kind == "linear":
            yield "scan", _scan(one, forward=True)
            yield "scan", _scan(one, forward=False)


def _halo(one: Pass, width: int, token_bytes: int) -> Pairs:
    """The `width` tokens before each segment of the target, as far as the source owns them."""

    def pairs(source: int, target: int) -> int:
        tokens = sum(
            part.stop - part.start
            for piece in one.layout.pieces_of(target)
            for part in one.layout.owners(max(0, piece.start - width), piece.start)
            if part.rank == source
        )
        return one.rows * token_bytes * tokens

    return pairs


def _scan(one: Pass, *, forward: bool) -> Pairs:
    """A state for each piece of the source that a later (backward: earlier) piece of the target
    follows; forward, every piece's total log decay goes along."""
    heads = one.model.dim // one.model.head_dim
    state = one.rows * heads * one.model.head_dim**2
    decay = one.rows * heads if forward else 0
    pieces = one.layout.pieces

    def pairs(source: int, target: int) -> int:
        count = 0
        for place, piece in enumerate(pieces):
            if piece.rank == source:
                rest = pieces[place + 1 :] if forward else pieces[:place]
                count += decay + state * any(other.rank == target for other in rest)
        return one.element_bytes * count

    return pairs


def _reversed(pairs: Pairs) -> Pairs:
    return lambda source, target: pairs(target, source)


def _of(pairs: Pairs, rank: int, ranks: int) -> Traffic:
    others = [other for other in range(ranks) if other != rank]
    return Traffic(sum(pairs(rank, r) for r in others), sum(pairs(r, rank) for r in others))
