"""Each rank's own slice of every sample, with labels by global position."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xdist.data.loader import BadSamples, Loader, Place, Request, read_batch
from xdist.data.prepare import prepare_text
from xdist.data.store import Split, TextStore
from xdist.errors import ConfigError, DataError, DocumentsError, GeometryError
from xdist.layout import Layout

CHUNK = 1024


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    for number in range(40):
        size = int(rng.integers(1, 400))
        (root / f"{number:02}.txt").write_bytes(rng.integers(0, 256, size, np.uint8).tobytes())
    files = sorted(root.glob("*.txt"))
    prepare_text(files, root / "store", held_out_fraction=0, chunk_bytes=CHUNK)
    return root / "store"


@pytest.fixture(scope="module")
def split(path: Path) -> Split:
    return TextStore(path).split("train")


def _expected(split: Split, start: int, length: int, separate: bool) -> tuple[list, list]:
    """One row, token by token."""
    whole = split.read(0, split.length).tolist()
    begins = set(split.cu_seqlens.tolist())
    tokens = whole[start : start + length]
    labels = []
    for at in range(start + 1, start + length + 1):
        absent = at >= split.length or (separate and at in begins)
        labels.append(-100 if absent else whole[at])
    return tokens, labels


def _layouts(length: int, parts: int, seed: int) -> list[Layout]:
    rng = np.random.default_rng(seed)
    cuts = sorted(rng.integers(0, length + 1, 2 * parts).tolist())
    drawn: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for run in zip([0, *cuts], [*cuts, length], strict=True):
        drawn[int(rng.integers(parts))].append(run)
    for held in drawn:
        rng.shuffle(held)
    return [
        Layout.contiguous(length, parts),
        Layout.zigzag(length, parts),
        Layout.from_segments(length, drawn),
    ]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    length=st.integers(1, 700),
    parts=st.integers(1, 5),
    data=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    separate=st.booleans(),
)
def test_slices_of_all_ranks_are_the_samples(split, length, parts, data, seed, separate) -> None:
    batch = data if separate else data * (1 + seed % 2)
    for layout in _layouts(length, parts, seed):
        request = Request.draw(seed, seed, batch, layout, split.length)
        seen = 0
        for rank in range(data * parts):
            place = Place(rank // parts, data, rank % parts)
            mode = "separate" if separate else "join"
            found = read_batch(split, request, place, documents=mode)
            assert found.tokens.dtype == found.labels.dtype == torch.int64
            assert found.bad == ()
            positions = layout.positions(place.sequence_rank)
            for index, row in enumerate(found.rows):
                start = request.starts[row]
                tokens, labels = _expected(split, start, length, separate)
                assert found.tokens[index].tolist() == np.asarray(tokens)[positions].tolist()
                assert found.labels[index].tolist() == np.asarray(labels)[positions].tolist()
                if separate:
                    assert found.cu_seqlens == split.documents(start, start + length)
                seen += len(positions)
        assert seen == batch * length


def test_the_end_of_the_store_has_no_label(split: Split) -> None:
    layout = Layout.contiguous(split.length, 1)
    for mode in ("join", "separate"):
        found = read_batch(split, Request(0, (0,), layout), documents=mode)
        assert found.labels[0, -1] == -100
        absent = int((found.labels == -100).sum())
        # Every file here has at least one byte, so each document ends at a place of its own.
        assert absent == (1 if mode == "join" else len(split.names))


def test_each_rank_reads_only_its_own_slice(path: Path) -> None:
    """Bytes counted at the disk: the slices, one chunk per edge at most, nothing of other ranks."""
    length = 6000
    for layout in (Layout.contiguous(length, 3), Layout.zigzag(length, 3)):
        total = 0
        for rank in range(3):
            split = TextStore(path).split("train")
            request = Request.draw(1, 0, 1, layout, split.length)
            read_batch(split, request, Place(sequence_rank=rank))
            slices = layout.local_length(rank)
            edges = 2 * len(layout.segments(rank))
            assert slices <= split.bytes_read <= slices + edges * CHUNK
            assert split.bytes_read < length
            total += split.bytes_read
        assert total < 2.5 * length


def test_order_does_not_depend_on_the_ranks(split: Split) -> None:
    def tokens(data: int, parts: int) -> list[list[int]]:
        rows: list[list[int]] = []
        for cursor in range(0, 24, 6):
            request = Request.draw(3, cursor, 6, Layout.zigzag(100, parts), split.length)
            for data_rank in range(data):
                whole = np.zeros((6 // data, 100), dtype=np.int64)
                for rank in range(parts):
                    part = read_batch(split, request, Place(data_rank, data, rank))
                    whole[:, request.layout.positions(rank)] = part.tokens.numpy()
                rows += whole.tolist()
        return rows

    one = tokens(1, 1)
    assert tokens(2, 1) == one
    assert tokens(3, 4) == one


def test_geometry_and_documents_are_refused(split: Split) -> None:
    layout = Layout.contiguous(10, 1)
    request = Request(0, (0, 10, 20), layout)
    with pytest.raises(GeometryError, match="3 sequences over 2 data ranks"):
        read_batch(split, request, Place(0, 2, 0))
    with pytest.raises(DocumentsError, match="3 rows a data rank"):
        read_batch(split, request, documents="separate")
    with pytest.raises(ConfigError, match="negative"):
        Loader(split, [], prefetch=-1)


def _requests(split: Split, count: int) -> Iterator[Request]:
    for cursor in range(0, 2 * count, 2):
        yield Request.draw(0, cursor, 2, Layout.contiguous(64, 1), split.length)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_loader_gives_every_batch_in_order_and_ends(split: Split, prefetch: int) -> None:
    with Loader(split, _requests(split, 7), prefetch=prefetch) as loader:
        found = list(loader)
        assert loader.waited_s >= 0
    assert [batch.request.cursor for batch in found] == list(range(0, 14, 2))
    for batch, request in zip(found, _requests(split, 7), strict=True):
        assert torch.equal(batch.tokens, read_batch(split, request).tokens)
    assert next(loader, None) is None


def test_loader_reads_ahead_no_further_than_told_and_closes(split: Split) -> None:
    drawn: list[int] = []
    ahead = threading.Event()

    def requests() -> Iterator[Request]:
        for request in _requests(split, 1000):
            drawn.append(request.cursor)
            if len(drawn) == 4:
                ahead.set()
            yield request

    loader = Loader(split, requests(), prefetch=2)
    next(loader)
    assert ahead.wait(30)
    # One handed over, two waiting, one in the thread's hand.
    assert len(drawn) == 4
    loader.close()
    loader.close()
    assert not any(thread.name == "xdist-data" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_the_thread_is_raised_at_its_batch(split: Split, prefetch: int) -> None:
    def requests() -> Iterator[Request]:
        yield Request(0, (0,), Layout.contiguous(8, 1))
        raise RuntimeError("from the reader")

    with Loader(split, requests(), prefetch=prefetch) as loader:
        assert next(loader).tokens.shape == (1, 8)
        with pytest.raises(RuntimeError, match="from the reader"):
            next(loader)
        assert next(loader, None) is None


def test_a_bad_chunk_stops_or_is_skipped_up_to_the_cap(path: Path, tmp_path: Path) -> None:
    """Failure 10: exit code 5 with array, chunk and sample; or a counted, capped skip."""
    copy = tmp_path / "store"
    files = sorted(path.parent.glob("*.txt"))
    prepare_text(files, copy, held_out_fraction=0, chunk_bytes=CHUNK)
    (copy / "train" / "tokens" / "c" / "2").unlink()
    split = TextStore(copy).split("train")
    layout = Layout.contiguous(CHUNK, 2)
    request = Request(10, (0, 2 * CHUNK - 100), layout)
    with pytest.raises(DataError) as caught:
        read_batch(split, request)
    text = str(caught.value)
    assert caught.value.exit_code == 5
    for part in ("array train/tokens", "chunk train/tokens/c/2", "sample 11"):
        assert part in text
    with pytest.raises(DataError, match="sample 11"), Loader(split, [request]) as loader:
        next(loader)

    found = read_batch(split, request, on_bad="skip")
    ((row, why),) = found.bad
    assert row == 1
    assert "sample 11" in why
    assert (found.labels[1] == -100).all()
    assert not (found.labels[0] == -100).any()
    # The other half of the same sample lies before the hole: agreed on, it is dropped there too.
    other = read_batch(split, Request(10, (0, CHUNK), layout), Place(sequence_rank=0))
    assert other.bad == ()
    dropped = other.without([1])
    assert (dropped.labels[1] == -100).all()
    assert torch.equal(dropped.labels[0], other.labels[0])
    assert (other.labels[1] != -100).all()
    assert other.without([]) is other

    counter = BadSamples(2)
    counter.add(2)
    with pytest.raises(DataError, match=r"(?s)3 samples .*data\.max_bad is 2; the last: sample 11"):
        counter.add(1, why)
    with pytest.raises(DataError):
        BadSamples(0).add(1)
