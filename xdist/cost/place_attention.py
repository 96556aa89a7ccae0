"""Attention over dims of a grid, one of them sharded, and to a condition: bytes by strategy.

Attention over whole dims mixes the tokens of those dims, flattened, row by row of the others. Where
one of them is sharded it becomes Ulysses or ring on the flattened tokens (cost/attention.py holds
the formulas; without a mask they depend on how many tokens each rank holds, not on which).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from xdist.cost.attention import moves_of
from xdist.cost.attention_keys import Problem
from xdist.cost.moves import Moved
from xdist.cost.place_spot import Option, Passes, Spot, at_least
from xdist.documents import Documents
from xdist.errors import ShapeError
from xdist.layout import Layout
from xdist.mask import Mask

# The order decides ties.
EMBEDDED = ("ulysses", "ring")
TO_CONDITION = ("gather", "ulysses", "ring")


@dataclass(frozen=True)
class Heads:
    """Heads of an attention: `count` of queries with `dim` channels each; keys may have fewer."""

    count: int
    dim: int
    key_count: int | None = None
    value_dim: int | None = None

    def __post_init__(self) -> None:
        at_least("heads", self.count, 1)
        at_least("head dim", self.dim, 1)
        at_least("value dim", self.values, 1)
        at_least("key heads", self.keys, 1)
        if self.count % self.keys:
            raise ShapeError(
                "query heads must be a multiple of key heads", f"{self.count} and {self.keys}"
            )

    @property
    def keys(self) -> int:
        """Heads of keys and values."""
        return self.count if self.key_count is None else self.key_count

    @property
    def values(self) -> int:
        """Channels of a value."""
        return self.dim if self.value_dim is None else self.value_dim


@dataclass(frozen=True)
class Condition:
    """What a block's queries attend to besides the grid: `tokens` a row of the batch.

    sharded: cut into even shares over the same ranks; else every rank holds all of it. heads: of
    the cross-attention.
    """

    tokens: int
    heads: Heads
    sharded: bool = False

    def __post_init__(self) -> None:
        at_least("a condition's tokens", self.tokens, 1)

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """Nothing where every rank holds it, or the keys' way to the queries, or both to heads."""
        if not self.sharded or spot.degree == 1:
            return (Option("", spot.nothing()),)
        keys = Layout.contiguous(self.tokens, spot.degree)
        inner = prod(spot.sizes) // spot.sizes[spot.dim]
        problem = _problem(self.heads, spot, inner, spot.batch, keys)
        return tuple(_option(name, problem) for name in TO_CONDITION)


def mixed(whole: tuple[int, ...], heads: Heads | None, spot: Spot) -> tuple[Option, ...]:
    """The ways of a block that needs the dims `whole`: none where one is sharded and has no heads
    to be embedded by."""
    if spot.dim not in whole or spot.degree == 1:
        return (Option("", spot.nothing()),)
    if heads is None:
        return ()
    inner = prod(spot.sizes[dim] for dim in whole if dim != spot.dim)
    rows = spot.batch * prod(spot.sizes) // (inner * spot.sizes[spot.dim])
    problem = _problem(heads, spot, inner, rows, None)
    return tuple(_option(name, problem) for name in EMBEDDED)


def _problem(heads: Heads, spot: Spot, inner: int, rows: int, keys: Layout | None) -> Problem:
    """`inner` tokens at each position of the sharded dim; keys: those of a condition."""
    tokens = spot.sizes[spot.dim] * inner
    layout = Layout.from_segments(tokens, [[(a * inner, b * inner)] for a, b in spot.runs])
    documents = Documents.of(None, tokens)
    return Problem(
        layout,
        documents,
        Mask(causal=False),
        keys or layout,
        Documents.of(None, keys.length) if keys else documents,
        keys is not None,
        rows,
        heads.count,
        heads.keys,
        heads.dim,
        heads.values,
        spot.itemsize,
    )


def _option(strategy: str, problem: Problem) -> Option:
    count = problem.parts
    if strategy == "ring":
        return Option(strategy, tuple(_ring(problem, rank) for rank in range(count)))
    found = [next(iter(moves_of(problem, strategy, rank).values())) for rank in range(count)]
    moved = tuple(Passes(Moved(a, b), Moved(c, d)) for a, b, c, d in found)
    idle = max(0, count - problem.heads) if strategy == "ulysses" else 0
    return Option(strategy, moved, idle)


def _ring(problem: Problem, rank: int) -> Passes:
    """As `cost.attention` counts it, without looking at a million positions: every query sees every
    key, and a rank without queries sees none."""
    queries, keys = problem.layout.local_lengths, problem.key_lengths()
    others = [r for r in range(problem.parts) if r != rank]
    users = sum(queries[r] > 0 for r in others)
    token = problem.batch * problem.groups * (problem.dim + problem.value_dim)
    out = users * keys[rank] * token
    into = sum(keys[r] for r in others) * token if queries[rank] else 0
    e, wide = problem.element_bytes, problem.sum_bytes
    forward = Moved(out * e, into * e)
    return Passes(forward, forward + Moved(into * wide, out * wide))
