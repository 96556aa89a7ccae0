"""Bytes and FLOPs of softmax attention under each strategy, as formulas.

Symbols: B batch, H query heads, G key heads, D key dim, E value dim, N queries and n of them on
this rank, M keys and m of them here, e bytes of an input element, w bytes of a sum (float32, or
float64 for float64); need(r, s) keys of rank s that queries of rank r see. Received by rank r:

    strategy | forward                                     | backward
    ring     | e B G (D+E) sum_s need(r,s)                 | the same + w B G (D+E) sum_u need(u,r)
    halo     | e B G (D+E) sum_s need(r,s)                 | w B G (D+E) sum_u need(u,r)
    gather   | e B G (D+E) (M-m)                           | w B G (D+E) m (P-1)
    ulysses  | e B ((N-n) h D + (M-m) g (D+E) + n (H-h) E) | e B ((N-n) h E + n (H-h) D)
             |   h, g: its query heads, their key heads    |   + B m (D+E) sum over others' key
             |                                             |   heads of (w if shared else e)
    2d       | ulysses among the u ranks of a row, its N and M the row's, then ring among the rows
             | with g for G and need(r, s) between rows, for the queries of its h heads

Sent mirrors received: summed over ranks they are equal. Keys held whole by every rank cost nothing
but ulysses' queries and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xdist.cost.attention_keys import Needs, Problem
from xdist.errors import StrategyError

# The order decides ties: least memory held for backward first.
STRATEGIES = ("ulysses", "halo", "ring", "gather", "2d")


@dataclass(frozen=True)
class AttentionCost:
    """Bytes this rank sends and receives, and multiply-adds counted twice, of one call."""

    forward_sent_bytes: int
    forward_received_bytes: int
    backward_sent_bytes: int
    backward_received_bytes: int
    forward_flops: int
    backward_flops: int

    @property
    def bytes(self) -> int:
        """Sent and received, forward and backward."""
        forward = self.forward_sent_bytes + self.forward_received_bytes
        return forward + self.backward_sent_bytes + self.backward_received_bytes


def unable(problem: Problem, strategy: str) -> str:
    """Why `strategy` cannot serve this call; empty when it can."""
    if strategy == "2d" and problem.parts % problem.ulysses:
        return f"rows of {problem.ulysses} ranks do not divide {problem.parts}"
    if strategy != "halo":
        return ""
    if problem.cross:
        return "halo needs keys that share the queries' positions (key_shard='same')"
    left, right = problem.mask.reach
    sides = [name for name, reach in (("left", left), ("right", right)) if reach is None]
    if sides:
        return f"halo needs a mask of finite reach; this one is unlimited to the {sides[0]}"
    return ""


def check_strategy(problem: Problem, strategy: str) -> None:
    """Raises StrategyError when a forced `strategy` does not exist or cannot serve this call."""
    if strategy not in STRATEGIES:
        raise StrategyError(
            f"attention has no strategy {strategy!r}",
            f"it has: auto, {', '.join(STRATEGIES)}",
            "choose one of those",
        )
    why = unable(problem, strategy)
    if why:
        raise StrategyError(
            f"strategy {strategy!r} cannot serve this call",
            f"{why}: {problem.mask}",
            "choose another strategy, or auto",
        )


def attention_cost(problem: Problem, strategy: str, rank: int) -> AttentionCost:
    """What one call moves and computes on `rank`."""
    check_strategy(problem, strategy)
    moved = _MOVED[strategy](problem, rank)
    forward, backward = _flops(problem, strategy, rank)
    return AttentionCost(*moved, forward, backward)


def moves_of(problem: Problem, strategy: str, rank: int) -> dict[str, Moved]:
    """Bytes by the move that the ledger counts them under: (sent, received) forward, backward."""
    check_strategy(problem, strategy)
    if strategy == "2d":
        inside, between = _two_parts(problem, rank)
        return {"switch": inside, "ring": between}
    move = "switch" if strategy == "ulysses" else strategy
    return {move: _MOVED[strategy](problem, rank)}


Moved = tuple[int, int, int, int]


def _ring(problem: Problem, rank: int) -> Moved:
    return _blocks(problem, problem.needs, rank, problem.groups)


def _blocks(problem: Problem, needs: Needs, place: int, groups: int) -> Moved:
    """Blocks of `groups` key heads to those who need them, twice, and their gradients back."""
    token = problem.batch * groups * (problem.dim + problem.value_dim)
    keys_out = needs.sent(place) * token * problem.element_bytes
    keys_in = needs.received(place) * token * problem.element_bytes
    grads_out = needs.received(place) * token * problem.sum_bytes
    grads_in = needs.sent(place) * token * problem.sum_bytes
    return keys_out, keys_in, keys_out + grads_out, keys_in + grads_in


def _halo(problem: Problem, rank: int) -> Moved:
    keys_out, keys_in, both_out, both_in = _ring(problem, rank)
    return keys_out, keys_in, both_out - keys_out, both_in - keys_in


def _gather(problem: Problem, rank: int) -> Moved:
    if problem.key_layout is None:
        return 0, 0, 0, 0
    own = problem.key_lengths()[rank]
    token = problem.batch * problem.groups * (problem.dim + problem.value_dim)
    out, into = own * (problem.parts - 1) * token, (problem.key_length - own) * token
    e, w = problem.element_bytes, problem.sum_bytes
    return out * e, into * e, into * w, out * w


def _ulysses(problem: Problem, rank: int) -> Moved:
    return _switched(problem, rank, range(problem.parts))


def _two_d(problem: Problem, rank: int) -> Moved:
    a, b, c, d = (x + y for x, y in zip(*_two_parts(problem, rank), strict=True))
    return a, b, c, d


def _two_parts(problem: Problem, rank: int) -> tuple[Moved, Moved]:
    """Inside the row, and between the rows."""
    rows = problem.rows
    row, column = rows.place(rank)
    start, stop = problem.key_heads(column, rows.inner)
    inside = _switched(problem, rank, rows.members(row))
    between = _blocks(problem, rows.needs[column], row, stop - start)
    return inside, between


def _switched(problem: Problem, rank: int, members: range) -> Moved:
    """The sequence of `members` switched for the heads and back."""
    b, e = problem.batch, problem.element_bytes
    me, ways = rank - members.start, len(members)
    start, stop = problem.query_heads(me, ways)
    mine, others = stop - start, problem.heads - (stop - start)
    here = problem.layout.local_length(rank)
    there = sum(problem.layout.local_length(r) for r in members) - here
    queries_in, queries_out = b * e * there * mine, b * e * here * others  # per head dim
    d, v = problem.dim, problem.value_dim
    keys_out = keys_in = grads_out = grads_in = 0
    if problem.key_layout is not None:
        held = problem.key_lengths()
        own = held[rank]
        runs = [problem.key_heads(place, ways) for place in range(ways)]
        users = [sum(a <= g < z for a, z in runs) for g in range(problem.groups)]
        counts = [z - a for a, z in runs]
        wide = [sum(problem.sum_bytes if users[g] > 1 else e for g in range(a, z)) for a, z in runs]
        away = (sum(held[r] for r in members) - own) * b * (d + v)
        keys_in, grads_out = away * counts[me] * e, away * wide[me]
        keys_out = own * b * (d + v) * e * (sum(counts) - counts[me])
        grads_in = own * b * (d + v) * (sum(wide) - wide[me])
    return (
        queries_out * d + keys_out + queries_in * v,
        queries_in * d + keys_in + queries_out * v,
        queries_out * v + queries_in * d + grads_out,
        queries_in * v + queries_out * d + grads_in,
    )


_MOVED: dict[str, Callable[[Problem, int], Moved]] = {
    "ulysses": _ulysses,
    "halo": _halo,
    "ring": _ring,
    "gather": _gather,
    "2d": _two_d,
}


def _flops(problem: Problem, strategy: str, rank: int) -> tuple[int, int]:
    """FLOPs of the products over visible pairs alone: forward 2 of them, backward 5."""
    if strategy == "ulysses":
        start, stop = problem.query_heads(rank)
        ranks = range(problem.parts)
    elif strategy == "2d":
        row, column = problem.rows.place(rank)
        start, stop = problem.query_heads(column, problem.ulysses)
        ranks = problem.rows.members(row)
    else:
        start, stop = 0, problem.heads
        ranks = range(rank, rank + 1)
    pairs = int(problem.pairs[ranks.start : ranks.stop, start:stop].sum())
    pairs *= 2 * problem.batch
    return (
        pairs * (problem.dim + problem.value_dim),
        pairs * (3 * problem.dim + 2 * problem.value_dim),
    )
