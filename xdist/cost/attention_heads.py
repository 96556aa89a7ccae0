"""Which heads a switch moves when: pure integers."""

from __future__ import annotations

from dataclasses import dataclass

from xdist.cost.attention_keys import Problem
from xdist.layout import even_sizes


@dataclass(frozen=True)
class HeadChunk:
    """One run of every member's heads, by member.

    `queries` are switched and computed together and read the key heads `keys`. Of those, `arriving`
    come with this chunk (the others came with the one before) and `leaving` are read by no later
    chunk: their gradients go back. Every key head arrives and leaves once at each member.
    """

    queries: tuple[range, ...]
    keys: tuple[range, ...]
    arriving: tuple[range, ...]
    leaving: tuple[range, ...]


def head_chunks(problem: Problem, ways: int, count: int) -> list[HeadChunk]:
    """The heads of `ways` members, each member's query heads cut into `count` runs.

    As `torch.tensor_split`: a member with fewer heads than runs has none in the last ones.
    """
    members = [_runs(problem, member, ways, count) for member in range(ways)]
    queries = [[run for run, _ in runs] for runs in members]
    keys = [[read for _, read in runs] for runs in members]
    arriving = [[_without(read, _at(own, i - 1)) for i, read in enumerate(own)] for own in keys]
    leaving = [[_without(read, _at(own, i + 1)) for i, read in enumerate(own)] for own in keys]
    columns = (zip(*table, strict=True) for table in (queries, keys, arriving, leaving))
    return [HeadChunk(*found) for found in zip(*columns, strict=True)]


def _runs(problem: Problem, member: int, ways: int, count: int) -> list[tuple[range, range]]:
    """(query heads, key heads that they read) of one member, by chunk."""
    start, stop = problem.query_heads(member, ways)
    per_group = problem.heads // problem.groups
    found = []
    for size in even_sizes(stop - start, count):
        heads = range(start, start + size)
        read = range(heads[0] // per_group, heads[-1] // per_group + 1) if heads else range(0)
        found.append((heads, read))
        start += size
    return found


def _at(runs: list[range], i: int) -> range:
    return runs[i] if 0 <= i < len(runs) else range(0)


def _without(run: range, other: range) -> range:
    """`run` less what it shares with a run before or behind it."""
    left = [head for head in run if head not in other]
    return range(left[0], left[-1] + 1) if left else range(0)
