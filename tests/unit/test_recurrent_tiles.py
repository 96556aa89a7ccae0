"""Tiles of a share: every token once, documents where they are, in both directions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import xdist
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.parallel.recurrent_tiles import Share, final_owners
from xdist.testing import layouts

N = 41
CUTS = [None, (0, 0, 3, 4, 4, 17, 30, N), (0, 20, N, N), tuple(range(N + 1))]


def shares(reverse: bool) -> list[Share]:
    found = []
    for parts in (1, 2, 4):
        for layout in layouts(N, parts).values():
            for cuts in CUTS:
                documents = Documents.of(cuts, N)
                found += [Share(layout, documents, rank, reverse) for rank in range(parts)]
    return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at_documents", [False, True])
def test_tiles_cover_the_share_and_say_where_documents_are(
    reverse: bool, at_documents: bool
) -> None:
    """Against a walk over single tokens in the order of the scan."""
    for share in shares(reverse):
        document_of = share.documents.index(np.arange(N))
        local = torch.from_numpy(share.layout.positions(share.rank))[None]
        seen: list[int] = []
        for segment in share.segments(6, at_documents=at_documents):
            before: int | None = None
            for number, tile in enumerate(segment.tiles):
                positions = tile.take(local)[0].tolist()
                assert 0 < len(positions) <= 6
                assert all(abs(b - a) == 1 for a, b in pairwise(positions))
                assert not reverse or positions == sorted(positions, reverse=True)
                if before is not None:
                    assert positions[0] == before + (-1 if reverse else 1)
                before = positions[-1]
                documents = document_of[positions]
                behind = positions[0] + (1 if reverse else -1)
                assert tile.fresh == (not 0 <= behind < N or document_of[behind] != documents[0])
                assert tile.document == documents[0]
                changes = np.flatnonzero(np.diff(documents)) + 1
                marks = [] if tile.starts is None else np.flatnonzero(tile.starts).tolist()
                assert marks == changes.tolist()
                assert not (at_documents and marks)
                ahead = positions[-1] + (-1 if reverse else 1)
                ends = not 0 <= ahead < N or document_of[ahead] != documents[-1]
                assert tile.closes == (documents[-1] if ends else None)
                if number == 0:
                    assert segment.enters != tile.fresh
                if number == len(segment.tiles) - 1:
                    assert segment.leaves != ends
                seen += positions
            inside = [d for t in segment.tiles for d in document_of[t.take(local)[0].tolist()]]
            assert segment.single == (len(set(inside)) == 1)
        assert sorted(seen) == sorted(local[0].tolist())


@pytest.mark.parametrize("reverse", [False, True])
def test_what_waits_and_what_reaches(reverse: bool) -> None:
    """Tiles that the entering state can reach lie in `reach`; those that are run before it comes do
    not; the state that leaves is made from `origin` on, and only `asked` tiles get its gradient."""
    for share in shares(reverse):
        for segment in share.segments(6, at_documents=False):
            reached, entering = [], segment.enters
            for tile in segment.tiles:
                entering = entering and not tile.fresh
                reached.append(entering)
                entering = entering and tile.starts is None
            assert all(not r for r in reached[segment.waiting :])
            if segment.enters:
                assert sum(reached) == segment.reach
            leaving = segment.leaves
            for number in reversed(range(len(segment.tiles))):
                tile = segment.tiles[number]
                assert not leaving or number >= segment.asked
                if leaving:
                    assert number >= segment.origin
                leaving = leaving and tile.starts is None and not tile.fresh


def test_final_states_are_where_documents_end() -> None:
    layout = Layout.zigzag(8, 2)  # ranks 0, 1, 1, 0 hold two tokens each
    documents = Documents.of((0, 3, 3, 8), 8)
    assert final_owners(Share(layout, documents, 0)) == [1, None, 0]
    assert final_owners(Share(layout, documents, 0, reverse=True)) == [0, None, 1]


def test_one_state_is_kept_a_tile() -> None:
    """Beside its inputs a recurrence keeps the state before each tile, and nothing else."""
    q, k, v = torch.randn(3, 1, 10_000, 1, 2).requires_grad_().unbind(0)
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        xdist.linear_attention(q, k, v[..., :1])
    states = [x for x in kept if x.shape == (1, 1, 2, 1)]
    assert len(states) == -(-10_000 // 4096)
    assert sum(x.numel() for x in kept) == 3 * 10_000 * 2 - 10_000 + 2 * len(states)
