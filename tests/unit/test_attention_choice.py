"""What `auto` chooses, recomputed from dense masks: who holds what, who must be sent what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xdist import Layout, Mask
from xdist.cost import attention_table
from xdist.cost.attention import STRATEGIES
from xdist.cost.attention_choice import FLOPS_PER_BYTE, choose
from xdist.cost.attention_keys import Problem
from xdist.documents import Documents

Dense = NDArray[np.bool_]
CAUSAL = Mask()
MASKS = (
    CAUSAL,
    Mask(causal=False),
    Mask(window=6),
    Mask(causal=False, window=(2, 90)),
    Mask(prefix=4, window=3),
    Mask(chunk=50),
    Mask(window=[0, 40, 40, None]),
)


def problem(
    layout: Layout, mask: Mask = CAUSAL, *, heads: tuple[int, int] = (4, 2), inner: int = 1,
    cuts: list[int] | None = None, dims: tuple[int, int] = (8, 4), element_bytes: int = 2,
) -> Problem:  # fmt: skip
    documents = Documents.of(cuts, layout.length)
    return Problem(
        layout, documents, mask, layout, documents, False,
        1, *heads, *dims, element_bytes, inner,
    )  # fmt: skip


@lru_cache(maxsize=8)
def dense(mask: Mask, documents: Documents, head: int) -> Dense:
    """visible[q, k] of one query head, from the sentence that defines a mask."""
    at = np.arange(documents.length)
    document = np.searchsorted(documents.cu_seqlens, at, side="right")
    starts = np.asarray((0, *documents.cu_seqlens))
    inside = at - starts[document]
    q, k = inside[:, None], inside[None, :]
    left, right = mask.sides(head)
    near = (q - k <= (len(at) if left is None else left)) & (
        k - q <= (len(at) if right is None else right)
    )
    if mask.causal:
        near &= k <= q
    chunk = mask.chunk or len(at) + 1
    together = (document[:, None] == document[None, :]) & (q // chunk == k // chunk)
    return together & (near | (k < mask.prefix))


@dataclass
class Counted:
    """A call simulated rank by rank. `known` has what was counted before, also for calls that
    differ in heads alone, with the dense masks it was counted from, so that their ids stay theirs.
    """

    call: Problem
    seen: list[Dense]
    held: list[NDArray[np.int64]]
    known: dict[Any, tuple[int, Any]]

    @classmethod
    def of(cls, call: Problem, known: dict[Any, tuple[int, Any]] | None = None) -> Counted:
        held = [call.layout.positions(rank) for rank in range(call.parts)]
        each = [0] * call.heads if call.mask.heads is None else range(call.heads)
        seen = [dense(call.mask, call.documents, head) for head in each]
        return cls(call, seen, held, {} if known is None else known)

    def keys(self, users: list[int], owners: list[int], heads: list[int]) -> int:
        """Keys of `owners` that a query of `users` sees by any of `heads`."""
        views = {id(self.seen[head]): self.seen[head] for head in heads}
        key = (tuple(users), tuple(owners), *views)
        if key not in self.known:
            q = np.concatenate([self.held[r] for r in users])
            k = np.concatenate([self.held[r] for r in owners])
            seen = np.zeros(len(k), dtype=bool)
            for mask in views.values():
                seen |= mask[np.ix_(q, k)].any(axis=0)
            self.known[key] = int(seen.sum()), views
        return self.known[key][0]

    def pairs(self, ranks: list[int], heads: list[int]) -> int:
        return sum(self._pairs(rank, self.seen[head]) for head in heads for rank in ranks)

    def _pairs(self, rank: int, seen: Dense) -> int:
        key = (rank, id(seen))
        if key not in self.known:
            self.known[key] = int(seen[self.held[rank]].sum()), seen
        return self.known[key][0]

    def share(self, place: int, ways: int) -> tuple[list[int], list[int]]:
        """Query heads of the `place`-th of `ways`, and the key heads they read."""
        heads = np.array_split(np.arange(self.call.heads), ways)[place].tolist()
        each = self.call.heads // self.call.groups
        return heads, sorted({head // each for head in heads})


Bytes = NDArray[np.int64]  # [P, P]: from whom to whom


def blocks(c: Counted, rows: list[list[int]], heads: list[int], groups: int, again: bool) -> Bytes:
    """Blocks between rows, whose holders are their last members: keys, gradients back."""
    p = c.call
    moved = np.zeros((p.parts, p.parts), dtype=np.int64)
    for user, owner in product(rows, rows):
        if user != owner:
            token = c.keys(user, owner, heads) * groups * (p.dim + p.value_dim)
            moved[owner[-1], user[-1]] += token * p.element_bytes * (2 if again else 1)
            moved[user[-1], owner[-1]] += token * max(4, p.element_bytes)
    return moved


def switched(c: Counted, members: list[int]) -> Bytes:
    """q, k, v to heads and the output back, forward; their gradients, backward."""
    p = c.call
    e, wide = p.element_bytes, max(4, p.element_bytes)
    moved = np.zeros((p.parts, p.parts), dtype=np.int64)
    shares = [c.share(place, len(members)) for place in range(len(members))]
    for i, j in product(range(len(members)), repeat=2):
        if i == j:
            continue
        here, there = len(c.held[members[i]]), len(c.held[members[j]])
        (mine, own_keys), (theirs, their_keys) = shares[i], shares[j]
        forward = here * (len(theirs) * p.dim + len(their_keys) * (p.dim + p.value_dim))
        forward += there * len(mine) * p.value_dim
        back = here * len(theirs) * p.value_dim + there * len(mine) * p.dim
        moved[members[i], members[j]] += (forward + back) * e
        for key in own_keys:
            several = sum(key in keys for _, keys in shares) > 1
            token = there * (p.dim + p.value_dim)
            moved[members[i], members[j]] += token * (wide if several else e)
    return moved


def simulated(c: Counted, strategy: str) -> tuple[Bytes, list[int]]:
    """Bytes from whom to whom, and visible pairs each rank computes."""
    p = c.call
    ranks, every = list(range(p.parts)), list(range(p.heads))
    alone = [[rank] for rank in ranks]
    own = [c.pairs([rank], every) for rank in ranks]
    if strategy in ("ring", "halo"):
        return blocks(c, alone, every, p.groups, again=strategy == "ring"), own
    if strategy == "gather":
        whole = replace(p, mask=Mask(causal=False))
        whole = replace(whole, documents=Documents.of(None, p.layout.length))
        return blocks(Counted.of(whole, c.known), alone, every, p.groups, again=False), own
    if strategy == "ulysses":
        return switched(c, ranks), [c.pairs(ranks, c.share(r, p.parts)[0]) for r in ranks]
    inner = p.ulysses
    rows = [ranks[first : first + inner] for first in range(0, p.parts, inner)]
    moved = np.zeros((p.parts, p.parts), dtype=np.int64)
    pairs = [0] * p.parts
    for row in rows:
        moved += switched(c, row)
    for column in range(inner):
        heads, groups = c.share(column, inner)
        # A row's keys lie with its member of this column.
        turned = [[r for r in row if r != row[column]] + [row[column]] for row in rows]
        moved += blocks(c, turned, heads, len(groups), again=True)
        for row in rows:
            pairs[row[column]] = c.pairs(row, heads)
    return moved, pairs


def argmin(call: Problem, known: dict[Any, tuple[int, Any]] | None = None) -> str:
    counted = Counted.of(call, known)
    ranked = []
    for order, strategy in enumerate(STRATEGIES):
        endless = None in call.mask.reach
        one_factor = call.ulysses in (1, call.parts)
        if (strategy == "halo" and endless) or (strategy == "2d" and one_factor):
            continue
        moved, pairs = simulated(counted, strategy)
        flops = [2 * count * (4 * call.dim + 3 * call.value_dim) for count in pairs]
        both = moved.sum(axis=0) + moved.sum(axis=1)
        score = max(f + FLOPS_PER_BYTE * int(b) for f, b in zip(flops, both, strict=True))
        ranked.append((score, int(both.sum()), order, strategy))
    return min(ranked)[-1]


def grid() -> Iterator[Problem]:
    packed = [0, 40, 40, 41, 150, 260]
    drawn = Layout.from_segments(260, [[(200, 260), (0, 7)], [(7, 99)], [], [(99, 200)]])
    for mask in MASKS:
        shapes = ((4, 2), (4, 4), (4, 1)) if mask.heads else ((4, 2), (3, 1), (16, 16), (5, 5))
        for heads, layout in product(
            shapes,
            (Layout.contiguous(260, 2), Layout.zigzag(259, 3), Layout.zigzag(260, 4), drawn),
        ):
            inner = 2 if layout.parts == 4 else 1
            cuts = packed if layout.length == 260 and heads[0] != 4 else None
            yield problem(layout, mask, heads=heads, inner=inner, cuts=cuts)
    for heads, make in product(((2, 2), (4, 1), (12, 3)), (Layout.contiguous, Layout.zigzag)):
        yield problem(make(600, 4), heads=heads, inner=2, dims=(64, 64))
        yield problem(make(600, 6), heads=heads, inner=2, dims=(64, 64), element_bytes=4)
        yield problem(make(600, 6), heads=heads, inner=3, dims=(64, 64))
        yield problem(make(600, 8), heads=heads, inner=2, dims=(64, 64), element_bytes=8)


def test_auto_is_the_argmin_of_counted_flops_and_bytes() -> None:
    """Recomputed from dense masks for each strategy; every strategy but gather wins somewhere."""
    chosen = set()
    for call in grid():
        expected = argmin(call)
        assert choose(call).strategy == expected, call
        chosen.add(expected)
    assert chosen >= {"ulysses", "ring", "halo", "2d"}


@pytest.mark.slow
def test_the_choices_of_the_page_are_the_argmin() -> None:
    """The page's first lengths, cell by cell: masks, layouts, heads and degrees recounted from
    dense masks."""
    asked, wrong = 0, []
    for (_, mask, packed), layout, degrees in product(
        attention_table.MASKS, attention_table.LAYOUTS, attention_table.DEGREES
    ):
        if layout == "balanced" and not packed:
            continue
        known: dict[Any, tuple[int, Any]] = {}
        for heads in attention_table.HEADS:
            call = attention_table.problem_of(
                mask, layout, heads, degrees, attention_table.LENGTHS[0], packed=packed
            )
            asked += 1
            if choose(call).strategy != argmin(call, known):
                wrong.append((mask, layout, heads, degrees))
    assert asked == 108
    assert not wrong


def test_flops_decide_where_ranks_would_wait() -> None:
    """Causal and contiguous, the last rank of a ring does nearly twice the mean: long sequences
    switch to heads although that moves more. Zigzag shares the work, and the bytes decide."""

    def call(make: Callable[[int, int], Layout], n: int) -> Problem:
        return problem(make(n, 4), heads=(8, 1), dims=(64, 64))

    assert choose(call(Layout.contiguous, 256)).strategy == "ring"
    found = choose(call(Layout.contiguous, 16384))
    assert found.strategy == "ulysses"
    assert found.busiest["ulysses"].bytes > found.busiest["ring"].bytes
    assert choose(call(Layout.zigzag, 16384)).strategy == "ring"


def test_more_ranks_than_heads_takes_both_factors() -> None:
    """Four heads on eight ranks leave four of them idle under ulysses; rows of four do not."""
    call = problem(Layout.zigzag(8192, 8), heads=(4, 4), inner=4, dims=(64, 64))
    assert choose(call).strategy == "2d"


def test_a_narrow_window_takes_halo_and_one_rank_moves_nothing() -> None:
    assert choose(problem(Layout.contiguous(4096, 4), Mask(window=16))).strategy == "halo"
    alone = choose(problem(Layout.contiguous(4096, 1)))
    assert {one.all_bytes for one in alone.busiest.values()} == {0}
    assert len({one.score for one in alone.busiest.values()}) == 1


def test_a_choice_says_the_busiest_rank_of_each_strategy_and_why_not_the_others() -> None:
    choice = choose(problem(Layout.contiguous(64, 4)))
    said = str(choice)
    assert said.startswith(f"attention: auto chose {choice.strategy} (busiest ranks: ")
    for name, one in choice.busiest.items():
        assert f"{name} {one.flops:.3g} FLOPs, {one.bytes} bytes on rank {one.rank}" in said
    assert "not halo: halo needs a mask of finite reach" in said
    assert "not 2d: 2d needs ring and ulysses degrees above 1" in said
    assert set(choice.busiest) | set(choice.unable) == set(STRATEGIES)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_pairs_are_the_visible_ones(mask: Mask) -> None:
    call = problem(Layout.zigzag(61, 3), mask, cuts=[0, 20, 33, 61])
    counted = Counted.of(call)
    for rank, head in product(range(3), range(4)):
        assert call.pairs[rank, head] == counted.pairs([rank], [head])


def test_the_table_of_choices_in_the_docs_is_the_one_counted() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "strategies" / "auto.md"
    wanted = "run: python -m xdist.cost.attention_table > docs/strategies/auto.md"
    assert docs.read_text(encoding="utf-8") == attention_table.page(), wanted
