"""Queries of one dim in tiles with the keys they see, and tiles that are alike in runs.

A tile is up to `most` neighbouring queries of one class and the run of keys that any of them sees.
Tiles of equal shape that follow each other at even distances are one Run: a strided view holds all
of them, so inside a grid one run serves all but the borders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from xdist_kernels.neighborhood.rules import Rule

# What copying a key into a tile costs, in scores; measured (README).
COPY_SCORES = 32
# Scores of one tile and head beyond which queries are cut further.
MOST_SCORES = 2**20


class Run(NamedTuple):
    """`tiles` tiles: tile i has queries at `queries + i hop + j step`, j < rows, and keys at
    `keys + i hop + j step`, j < columns, both in local indices.

    offset: steps from the first query to the first key. seen: for each row the columns
    `[low, high)` it sees; None where every row sees all.
    """

    tiles: int
    hop: int
    step: int
    queries: int
    rows: int
    keys: int
    columns: int
    offset: int
    seen: tuple[tuple[int, int], ...] | None

    def part(self, start: int, tiles: int) -> Run:
        """Tiles `[start, start + tiles)` of the run."""
        ahead = start * self.hop
        return self._replace(tiles=tiles, queries=self.queries + ahead, keys=self.keys + ahead)


def rows_of(rules: Sequence[Rule]) -> tuple[int, ...]:
    """How many queries along each dim a tile holds, so that scores and copied keys cost least."""
    rows = [1] * len(rules)

    def cost(of: Sequence[int]) -> float:
        columns = prod(rule.columns(n) for rule, n in zip(rules, of, strict=True))
        if columns * prod(of) > MOST_SCORES:
            return float("inf")
        return columns * (1 + COPY_SCORES / prod(of))

    best = cost(rows)
    while True:
        tries = []
        for dim, rule in enumerate(rules):
            if rows[dim] < rule.most_rows:
                more = list(rows)
                more[dim] = min(2 * rows[dim], rule.most_rows)
                # Of equals the last dim, whose positions lie side by side in memory.
                tries.append((cost(more), -dim, more))
        if not tries or min(tries)[0] >= best:
            return tuple(rows)
        best, _, rows = min(tries)


@lru_cache(maxsize=64)
def runs_of(rule: Rule, start: int, stop: int, first_key: int, most: int) -> tuple[Run, ...]:
    """The runs of queries `[start, stop)`, with keys in a tensor that starts at `first_key`."""
    runs: list[Run] = []
    for tile in _tiles(rule, start, stop, first_key, most):
        last = runs[-1] if runs else None
        if last is not None and _follows(last, tile):
            hop = tile.queries - last.queries if last.tiles == 1 else last.hop
            runs[-1] = last._replace(tiles=last.tiles + 1, hop=hop)
        else:
            runs.append(tile)
    return tuple(runs)


def _follows(run: Run, tile: Run) -> bool:
    ahead = (tile.queries - run.queries, tile.keys - run.keys)
    hop = ahead[0] if run.tiles == 1 else run.hop
    if hop < 1 or ahead != (hop * run.tiles,) * 2:
        return False
    # Tiles of one class may overlap by whole hops; those of different classes share nothing.
    if hop % run.step and ahead[0] >= run.step:
        return False
    alike = tile._replace(queries=run.queries, keys=run.keys, tiles=run.tiles, hop=run.hop)
    return alike == run


def _tiles(rule: Rule, start: int, stop: int, first_key: int, most: int) -> Iterator[Run]:
    step = rule.step
    for head in range(start, min(start + step, stop)):
        position = head
        while position < stop:
            first, count = rule.keys(position)
            end = first + count * step
            held = [(first, count)]
            for later in range(position + step, stop, step):
                low, more = rule.keys(later)
                # Queries that share no key are better served by tiles of their own.
                if len(held) == most or low >= end:
                    break
                end = max(end, low + more * step)
                held.append((low, more))
            seen = tuple(((low - first) // step, (low - first) // step + n) for low, n in held)
            columns = (end - first) // step
            yield Run(
                tiles=1,
                hop=step,
                step=step,
                queries=position - start,
                rows=len(held),
                keys=first - first_key,
                columns=columns,
                offset=(first - position) // step,
                seen=None if set(seen) == {(0, columns)} else seen,
            )
            position += len(held) * step


def parts_of(runs: Sequence[Run], batch: int, most: int) -> Iterator[tuple[slice, tuple[Run, ...]]]:
    """The tiles of one run a dim and `batch` rows, in parts of at most `most` tiles."""
    counts = [batch, *(run.tiles for run in runs)]
    takes = []
    for count in reversed(counts):
        takes.append(max(1, min(count, most)))
        most //= takes[-1]
    takes.reverse()
    starts = product(*(range(0, n, take) for n, take in zip(counts, takes, strict=True)))
    for first, *corner in starts:
        part = [
            run.part(at, min(take, run.tiles - at))
            for run, at, take in zip(runs, corner, takes[1:], strict=True)
        ]
        yield slice(first, min(first + takes[0], batch)), tuple(part)
