"""Checkpoints on a grid of layers and tokens: kept and working bytes, and the best grid.

L layers over n tokens of a rank, in chunks of s tokens and groups of l layers:

    kept       (groups - 1) n X           the stream between groups (the first is the caller's)
               + (chunks - 1) sum S_i     the states before each chunk but those that are zero
    working    s sum W_i                  a cell, chunk x group, with its graph; the largest group
               + (l - 1) n X              where states cross ranks: the group's streams once more

X, S_i, W_i: bytes of a token of the stream, of layer i's states, of what autograd keeps of a token
in layer i. Layers that need the whole sequence (softmax attention) are groups of one layer.

Source: Lee et al., "Video-Ma2mba" (arXiv 2411.19460), section 3.3, multi-axis gradient
checkpointing, there for Mamba-2 on one device; LS/s + LS/l + ls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CHUNK_STEP = 1024  # tokens: candidates for s are its multiples


@dataclass(frozen=True)
class Layer:
    """state_bytes: of all its states before one token, all rows of the batch; cell_bytes: what
    autograd keeps of one token, all rows. whole: it needs all tokens at once."""

    state_bytes: int
    cell_bytes: int
    whole: bool = False


@dataclass(frozen=True)
class Problem:
    """tokens: of this rank, in one row. stream_bytes: of one token between layers, all rows.
    exchanges: whether states cross segments, so that each layer is swept over the whole share."""

    tokens: int
    stream_bytes: int
    layers: tuple[Layer, ...]
    exchanges: bool = False


@dataclass(frozen=True)
class Grid:
    """A choice and what it costs, in bytes on this rank."""

    chunk_tokens: int
    group_layers: int
    kept_bytes: int
    working_bytes: int

    def __str__(self) -> str:
        return (
            f"chunks of {self.chunk_tokens} tokens x groups of {self.group_layers} layers: "
            f"{self.kept_bytes} bytes kept, {self.working_bytes} at work"
        )


def groups(layers: Sequence[Layer], group_layers: int) -> list[tuple[int, int]]:
    """Groups `[first, stop)`: runs of at most `group_layers` layers; a whole layer is its own."""
    found: list[tuple[int, int]] = []
    for index, layer in enumerate(layers):
        first = found[-1][0] if found else 0
        joins = found and not layer.whole and not layers[first].whole
        if joins and index - first < group_layers:
            found[-1] = (first, index + 1)
        else:
            found.append((index, index + 1))
    return found


def kept_bytes(
    problem: Problem, chunk_tokens: int, group_layers: int, carried: int | None = None
) -> int:
    """Bytes kept from forward to backward.

    carried: chunks before which a state is not zero; None is one document and one segment. Beside
    them, independent of n: halos, and what exchanges received (their ledger's number).
    """
    chunks = -(-problem.tokens // chunk_tokens)
    carried = max(chunks - 1, 0) if carried is None else carried
    streams = len(groups(problem.layers, group_layers)) - 1
    states = sum(layer.state_bytes for layer in problem.layers if not layer.whole)
    return max(streams, 0) * problem.tokens * problem.stream_bytes + carried * states


def working_bytes(problem: Problem, chunk_tokens: int, group_layers: int) -> int:
    """Bytes of the largest group's backward beside what is kept and the gradient in flight."""
    most = 0
    for first, stop in groups(problem.layers, group_layers):
        own = problem.layers[first:stop]
        tokens = problem.tokens if own[0].whole else min(chunk_tokens, problem.tokens)
        if problem.exchanges:
            cell = max(layer.cell_bytes for layer in own) * tokens
            cell += (len(own) - 1) * problem.tokens * problem.stream_bytes
        else:
            cell = sum(layer.cell_bytes for layer in own) * tokens
        most = max(most, cell)
    return most


def grid(
    problem: Problem, chunk_tokens: int, group_layers: int, carried: int | None = None
) -> Grid:
    """The costs of one choice; carried as in `kept_bytes`."""
    return Grid(
        chunk_tokens,
        group_layers,
        kept_bytes(problem, chunk_tokens, group_layers, carried),
        working_bytes(problem, chunk_tokens, group_layers),
    )


@lru_cache(maxsize=64)
def choose(
    problem: Problem, *, chunk_tokens: int | None = None, group_layers: int | None = None
) -> Grid:
    """The grid with the fewest kept and working bytes together; of equals, fewer layers in a group,
    then longer chunks. What is given is not chosen.

    Candidates: every multiple of CHUNK_STEP up to the first that holds all tokens, every number of
    layers.
    """
    most = max(1, -(-problem.tokens // CHUNK_STEP))
    best: tuple[int, int, int] | None = None
    for size in (
        range(1, max(1, len(problem.layers)) + 1) if group_layers is None else [group_layers]
    ):
        # Linear in s but for the number of chunks: one row of candidates at a time.
        s = np.arange(1, most + 1, dtype=np.int64) * CHUNK_STEP
        if chunk_tokens is not None:
            s = np.array([chunk_tokens], dtype=np.int64)
        total = _totals(problem, s, size)
        place = len(total) - 1 - int(np.argmin(total[::-1]))
        found = int(total[place]), size, int(s[place])
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    return grid(problem, best[2], best[1])


def _totals(problem: Problem, s: np.ndarray, group_layers: int) -> np.ndarray:
    """kept + working bytes for each s, from three evaluations: both are affine in chunks and s."""
    chunks = -(-problem.tokens // s) - 1
    states = sum(layer.state_bytes for layer in problem.layers if not layer.whole)
    fixed = kept_bytes(problem, 1, group_layers, carried=0)
    held = np.minimum(s, problem.tokens)
    most = np.zeros_like(s)
    for first, stop in groups(problem.layers, group_layers):
        own = Problem(
            problem.tokens, problem.stream_bytes, problem.layers[first:stop], problem.exchanges
        )
        none = working_bytes(own, 0, group_layers)
        one = working_bytes(own, 1, group_layers) - none
        most = np.maximum(most, none + one * held)
    return fixed + np.maximum(chunks, 0) * states + most
