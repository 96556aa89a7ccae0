"""Queries of one dim in tiles with the keys they see, and tiles that are alike in runs.

A tile is up to `most` neighbouring queries of one class and the run of keys that any of them sees.
Tiles of equal shape that follow each other at even distances are one Run, and so are those of
neighbouring classes: a strided view holds all of them, and inside a grid one run serves all but the
borders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from xdist_kernels.neighborhood.rules import Rule

# What copying a key into a tile costs, in scores; `make bench BENCH=neighborhood` tries it.
COPY_SCORES = 32
# Scores of one tile and head beyond which queries are cut further.
MOST_SCORES = 2**20


class Run(NamedTuple):
    """Alike tiles of one dim: `tiles` of each of `classes` neighbouring classes.

    Tile i of class c has queries at `queries + c + i hop + j step`, j < rows, and keys at
    `keys + c + i hop + j step`, j < columns, both in local indices. offset: steps from the first
    query to the first key. seen: for each row the columns `[low, high)` it sees; None where every
    row sees all.
    """

    classes: int
    tiles: int
    hop: int
    step: int
    queries: int
    rows: int
    keys: int
    columns: int
    offset: int
    seen: tuple[tuple[int, int], ...] | None

    def part(self, classes: range, tiles: range) -> Run:
        """Some of its tiles of some of its classes."""
        ahead = classes.start + tiles.start * self.hop
        return self._replace(
            classes=len(classes),
            tiles=len(tiles),
            queries=self.queries + ahead,
            keys=self.keys + ahead,
        )


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
    groups: list[list[Run]] = []
    for head in range(start, min(start + rule.step, stop)):
        mine = _joined(_tiles(rule, head, start, stop, first_key, most))
        if groups and _continues(groups[-1], mine):
            groups[-1] = [run._replace(classes=run.classes + 1) for run in groups[-1]]
        else:
            groups.append(mine)
    return tuple(run for group in groups for run in group)


def _tiles(
    rule: Rule, head: int, start: int, stop: int, first_key: int, most: int
) -> Iterator[Run]:
    """The class of query `head`, a tile at a time."""
    step, position = rule.step, head
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
            classes=1,
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


def _joined(tiles: Iterable[Run]) -> list[Run]:
    """Tiles of one class that follow each other at even distances, in one run."""
    runs: list[Run] = []
    for tile in tiles:
        last = runs[-1] if runs else None
        if last is not None:
            hop = tile.queries - last.queries if last.tiles == 1 else last.hop
            ahead = hop * last.tiles
            longer = last._replace(tiles=last.tiles + 1, hop=hop)
            if tile == last._replace(
                tiles=1, hop=tile.hop, queries=last.queries + ahead, keys=last.keys + ahead
            ):
                runs[-1] = longer
                continue
        runs.append(tile)
    return runs


def _continues(group: Sequence[Run], mine: Sequence[Run]) -> bool:
    """Whether `mine` is the next class after those of `group`, and alike."""
    if len(group) != len(mine):
        return False
    return all(
        other
        == run._replace(classes=1, queries=run.queries + run.classes, keys=run.keys + run.classes)
        for run, other in zip(group, mine, strict=True)
    )


def parts_of(runs: Sequence[Run], batch: int, most: int) -> Iterator[tuple[slice, tuple[Run, ...]]]:
    """The tiles of one run a dim and `batch` rows, in parts of at most `most` tiles."""
    counts = [batch, *(count for run in runs for count in (run.classes, run.tiles))]
    takes = []
    for count in reversed(counts):
        takes.append(max(1, min(count, most)))
        most //= takes[-1]
    takes.reverse()
    cuts = [
        [range(start, min(start + take, count)) for start in range(0, count, take)]
        for count, take in zip(counts, takes, strict=True)
    ]
    for rows, *corner in product(*cuts):
        part = [
            run.part(classes, tiles)
            for run, classes, tiles in zip(runs, corner[::2], corner[1::2], strict=True)
        ]
        yield slice(rows.start, rows.stop), tuple(part)
