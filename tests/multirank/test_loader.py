"""Real ranks read their own slices: together the samples, each at the cost of its own slice."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import xdist
from xdist.data.loader import Loader, Place, Request
from xdist.data.prepare import prepare_text
from xdist.data.store import TextStore
from xdist.layout import Layout
from xdist.testing import RankPool

CHUNK = 1024
LENGTH = 20_011
STEPS = 3


class Read(NamedTuple):
    """What one rank read of one layout."""

    place: Place
    tokens: np.ndarray
    labels: np.ndarray
    bytes_read: int


def _read(path: str, data: int, kinds: list[str]) -> list[Read]:
    """In a rank: every layout's batches through a loader of its own."""
    mesh = xdist.init_mesh(data=data, ring=xdist.init_mesh().world_size // data)
    place = Place(mesh.data_rank, mesh.data_size, mesh.sequence_rank)
    found = []
    for kind in kinds:
        layout = getattr(Layout, kind)(LENGTH, mesh.sequence_size)
        split = TextStore(path).split("train")
        requests = (
            Request.draw(0, cursor, 2, layout, split.length) for cursor in range(0, 2 * STEPS, 2)
        )
        with Loader(split, requests, place) as loader:
            batches = list(loader)
        found.append(
            Read(
                place,
                np.stack([batch.tokens.numpy() for batch in batches]),
                np.stack([batch.labels.numpy() for batch in batches]),
                split.bytes_read,
            )
        )
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    text = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)
    (root / "text.bin").write_bytes(text.tobytes())
    prepare_text([root / "text.bin"], root / "store", held_out_fraction=0, chunk_bytes=CHUNK)
    return root / "store"


def _assert_whole(path: Path, ranks: list[list[Read]], kinds: list[str], data: int) -> None:
    split = TextStore(path).split("train")
    text = split.read(0, split.length).astype(np.int64)
    parts = len(ranks) // data
    for index, kind in enumerate(kinds):
        layout = getattr(Layout, kind)(LENGTH, parts)
        whole = np.full((2, STEPS, 2, LENGTH), -1)
        for read in (rank[index] for rank in ranks):
            share = 2 // data
            rows = slice(read.place.data_rank * share, (read.place.data_rank + 1) * share)
            positions = layout.positions(read.place.sequence_rank)
            whole[0][:, rows, positions] = read.tokens
            whole[1][:, rows, positions] = read.labels
            slices = STEPS * share * positions.size
            edges = STEPS * share * 2 * len(layout.segments(read.place.sequence_rank))
            assert slices <= read.bytes_read <= slices + edges * CHUNK
        for step in range(STEPS):
            request = Request.draw(0, 2 * step, 2, layout, split.length)
            for row, start in enumerate(request.starts):
                np.testing.assert_array_equal(whole[0, step, row], text[start : start + LENGTH])
                after = text[start + 1 : start + LENGTH + 1]
                np.testing.assert_array_equal(whole[1, step, row, : after.size], after)
                assert (whole[1, step, row, after.size :] == -100).all()


KINDS = ["contiguous", "zigzag"]


def test_two_ranks_read_their_own_slices(pool2: RankPool, path: Path) -> None:
    for data in (1, 2):
        _assert_whole(path, pool2.run(_read, str(path), data, KINDS), KINDS, data)


def test_three_ranks_read_uneven_slices(pool3: RankPool, path: Path) -> None:
    _assert_whole(path, pool3.run(_read, str(path), 1, KINDS), KINDS, 1)


def test_data_and_sequence_ranks_together(pool4: RankPool, path: Path) -> None:
    _assert_whole(path, pool4.run(_read, str(path), 2, KINDS), KINDS, 2)
