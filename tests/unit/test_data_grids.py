"""A store of grids: what is written is read back, box by box, at the price of its chunks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xdist.data.degrade import Degradation
from xdist.data.grid_box import part_box, require_share
from xdist.data.grid_store import GridStore
from xdist.data.grid_write import Contents, GridSet, chunk_sizes, write_grids
from xdist.data.identity import require_same_data
from xdist.data.store import TextStore
from xdist.errors import ConfigError, DataError
from xdist.grid_shard import GridShard
from xdist.layout import even_sizes
from xdist.mesh import Mesh

SIZES = (9, 7, 6)


def _rows(count: int, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 250, (*sizes, 2), dtype=np.uint8),
            rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), sizes),
        )
        for _ in range(count)
    ]


def _set(rows: list[Any], sizes: tuple[int, ...] = SIZES) -> GridSet:
    return GridSet(sizes, len(rows), "uint8", rows, (10.0, 0.0), (0.5, 2.0), (250.0, 250.0))


def _contents(rows: list[Any], **changes: Any) -> Contents:
    grids = changes.pop("grids", [_set(rows)])
    splits = {"train": [0]} | ({"held_out": [1]} if len(grids) > 1 else {})
    return Contents("volume", ("a", "b"), ("x", "y", "z"), grids, splits, **changes)


@pytest.fixture
def rows() -> list[Any]:
    return _rows(3)


@pytest.fixture
def store(tmp_path: Path, rows: list[Any]) -> Path:
    write_grids(tmp_path / "s", _contents(rows, chunk=(2, 7, 3)))
    return tmp_path / "s"


def test_boxes_are_what_was_written(store: Path, rows: list[Any]) -> None:
    split = GridStore(store).split("train")
    assert (split.samples, split.sizes(0), split.channels) == (3, SIZES, ("a", "b"))
    rng = np.random.default_rng(1)
    for number in range(12):
        sample = number % 3
        box = [tuple(sorted(rng.integers(0, size + 1, 2).tolist())) for size in SIZES]
        where = tuple(slice(a, b) for a, b in box)
        image, labels = rows[sample]
        wanted = (image[where].astype(np.float32) - (10.0, 0.0)) * (0.5, 2.0)
        found = split.image(sample, box)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)
        classes = np.where(labels[where] == 255, -100, labels[where].astype(np.int64))
        np.testing.assert_array_equal(split.labels(sample, box), classes)
    GridStore(store).verify()


def test_reading_costs_the_chunks_of_the_box(store: Path) -> None:
    split = GridStore(store).split("train")
    chunk = 2 * 7 * 3
    for box, chunks in (
        ([(0, 2), (0, 7), (0, 3)], 1),
        ([(1, 3), (2, 3), (0, 3)], 2),
        ([(0, 9), (0, 7), (0, 6)], 10),
        ([(4, 4), (0, 7), (0, 6)], 0),
    ):
        before = split.bytes_read
        split.image(0, box)
        assert split.bytes_read - before == chunks * chunk * 2
        split.labels(0, box)
        assert split.bytes_read - before == chunks * chunk * 3 == split.box_bytes(0, box)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_slabs_of_any_dim_and_degree_cost_no_more_than_themselves(
    tmp_path: Path, rows: list[Any], dim: int
) -> None:
    """Chunks that are planes of a dim: shares and planes beside them cost their own bytes."""
    planes = tuple(1 if d == dim else size for d, size in enumerate(SIZES))
    write_grids(tmp_path / "s", _contents(rows, chunk=planes))
    split = GridStore(tmp_path / "s").split("train")
    plane = 3 * np.prod([s for d, s in enumerate(SIZES) if d != dim])
    for ranks, halo in itertools.product((1, 2, 4, 8), (0, 1, 3)):
        shares = even_sizes(SIZES[dim], ranks)
        for rank, share in enumerate(shares):
            start = sum(shares[:rank])
            low, high = max(0, start - halo), min(SIZES[dim], start + share + halo)
            box = [(0, size) for size in SIZES]
            box[dim] = (low, high) if share else (start, start)
            before = split.bytes_read
            split.image(0, box), split.labels(0, box)
            assert split.bytes_read - before == plane * (high - low if share else 0)


def test_chunks_are_slabs_as_thin_as_is_worth_it() -> None:
    assert chunk_sizes((197, 233, 189), 1, None, 0) == (1, 233, 189)
    assert chunk_sizes((197, 233, 189), 1, None, 2) == (197, 233, 1)
    assert chunk_sizes((16, 32, 32), 1, None, 0) == (16, 32, 32)
    assert chunk_sizes((100, 64, 64), 4, None, 0) == (4, 64, 64)
    # A plane of 4 GiB is no chunk.
    found = chunk_sizes((10, 1 << 16, 1 << 15), 2, None, 0)
    assert found[0] == 1
    assert np.prod(found) * 2 <= 512 << 20


@pytest.mark.parametrize("chunk", [(2, 7), (0, 7, 6), (10, 7, 6), (2, 7, 6, 1)])
def test_a_chunk_grid_that_does_not_match_is_refused(chunk: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"chunk grid does not match the grid\nchunks of \("):
        chunk_sizes(SIZES, 2, chunk, 0)
    with pytest.raises(ConfigError, match="slab dim 3"):
        chunk_sizes(SIZES, 2, None, 3)


def test_chunk_grids_of_image_and_labels_must_match(store: Path) -> None:
    path = store / "grids" / "0" / "labels" / "zarr.json"
    found = json.loads(path.read_text())
    found["chunk_grid"]["configuration"]["chunk_shape"] = [1, 3, 7, 3]
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"image \(1, 2, 7, 3\), labels \(1, 3, 7, 3\)"):
        GridStore(store)


def test_damage_names_the_chunk(store: Path) -> None:
    whole = [(0, size) for size in SIZES]
    chunk = store / "grids" / "0" / "image" / "c" / "1" / "2" / "0" / "1" / "0"
    data = bytearray(chunk.read_bytes())
    data[-2] ^= 1
    chunk.write_bytes(data)
    split = GridStore(store).split("train")
    split.image(0, whole)
    with pytest.raises(DataError, match="grids/0/image/c/1/2/0/1/0"):
        split.image(1, whole)
    chunk.unlink()
    with pytest.raises(DataError, match="is missing"):
        GridStore(store).split("train").image(1, whole)
    with pytest.raises(DataError):
        GridStore(store).verify()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shape", [3, 9, 7, 5, 2], "changed after it was prepared"),
        ("data_type", "float64", "allowed: uint8, uint16, int16, float32"),
        ("codecs", [{"name": "bytes"}, {"name": "gzip"}], "allowed: bytes then zstd"),
    ],
)
def test_metadata_that_are_not_the_prepared_ones_are_refused(
    store: Path, key: str, value: Any, message: str
) -> None:
    path = store / "grids" / "0" / "image" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=message):
        GridStore(store)


def test_facts_are_held_by_the_fingerprint(store: Path, tmp_path: Path, rows: list[Any]) -> None:
    again = write_grids(tmp_path / "again", _contents(rows, chunk=(2, 7, 3)))
    assert again.fingerprint == GridStore(store).fingerprint
    other = _rows(3)
    other[2][0][8, 6, 5, 1] ^= 1
    changed = write_grids(tmp_path / "other", _contents(other, chunk=(2, 7, 3)))
    assert changed.fingerprint != again.fingerprint
    with pytest.raises(DataError, match="image_sha256"):
        require_same_data(GridStore(store).identity, GridStore(tmp_path / "other").identity)
    path = store / "zarr.json"
    path.write_text(path.read_text().replace('"scale": [', '"scale": [ 3, '))
    with pytest.raises(DataError, match="does not fit its facts"):
        GridStore(store)


def test_a_store_in_the_way(store: Path, tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match="exists"):
        write_grids(store, _contents(rows))
    assert write_grids(store, _contents(rows), existing="keep").kept
    with pytest.raises(DataError, match="holds other data"):
        write_grids(store, _contents(rows, recipe={"seed": 1}), existing="keep")
    made = write_grids(store, _contents(rows, recipe={"seed": 1}), existing="replace")
    assert not made.kept
    assert GridStore(store).identity["facts"]["recipe"] == {"seed": 1}
    with pytest.raises(DataError, match="is not a store this version reads"):
        TextStore(store)
    with pytest.raises(DataError, match="no data store"):
        GridStore(tmp_path / "nothing")
    with pytest.raises(DataError, match="no split 'test'"):
        GridStore(store).split("test")


def test_samples_of_several_sizes_and_splits(tmp_path: Path) -> None:
    first, second = _rows(2), _rows(1, (4, 3, 5), seed=9)
    contents = _contents([], grids=[_set(first), _set(second, (4, 3, 5))])
    made = write_grids(tmp_path / "s", contents)
    assert made.samples == {"train": 2, "held_out": 1}
    held_out = GridStore(tmp_path / "s").split("held_out")
    assert held_out.sizes(0) == (4, 3, 5)
    box = [(0, 4), (0, 3), (0, 5)]
    raw = held_out.image(0, box) / (0.5, 2.0) + (10.0, 0.0)
    np.testing.assert_array_equal(raw, second[0][0])
    for sample, at in ((1, box), (-1, box), (0, [(0, 5), (0, 3), (0, 5)]), (0, box[:2])):
        with pytest.raises(DataError):
            held_out.image(sample, at)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image, labels = _rows(1)[0]
    bad = np.full(SIZES, 3, dtype=np.uint8)
    for row, message in (
        ((image[:8], labels), r"got \(8, 7, 6, 2\), want \(9, 7, 6, 2\)"),
        ((image, None), "got None"),
        ((image, bad), "class 3, 3 are named"),
        ((np.where(image > 240, np.nan, image), labels), "are not finite"),
    ):
        with pytest.raises(DataError, match=message):
            write_grids(tmp_path / "s", _contents([row]))
    assert not list(tmp_path.iterdir())


def test_a_part_lies_in_its_sample() -> None:
    alone = GridShard(Mesh.one_rank(), (4, 5), dim=1)
    assert part_box(alone) == [(0, 4), (0, 5)]
    assert part_box(alone, (2, 3), (9, 9)) == [(2, 6), (3, 8)]
    with pytest.raises(DataError, match=r"\(4, 5\) positions from \(6, 0\) on, of \(9, 9\)"):
        part_box(alone, (6, 0), (9, 9))
    require_share(alone, 5)
    with pytest.raises(
        DataError, match=r"its 5 positions give shares of \(5,\), each rank needs 6"
    ):
        require_share(alone, 6)


def test_a_slab_is_hidden_from_training_and_all_that_is_judged(store: Path) -> None:
    split = GridStore(store).split("train")
    for slab in ((0, 3, 5), (1, 0, 2), (2, 5, 6)):
        train, judged = split.without(slab), split.only(slab)
        for box in ([(0, 9), (0, 7), (0, 6)], [(2, 4), (1, 6), (3, 6)], [(4, 4), (0, 7), (0, 6)]):
            whole = split.labels(1, box)
            seen, scored = train.labels(1, box), judged.labels(1, box)
            for at in np.ndindex(*whole.shape):
                inside = slab[1] <= box[slab[0]][0] + at[slab[0]] < slab[2]
                assert seen[at] == (-100 if inside else whole[at])
                assert scored[at] == (whole[at] if inside else -100)
            np.testing.assert_array_equal(train.image(1, box), split.image(1, box))
    for slab in ((3, 0, 1), (0, 0, 9), (0, 4, 4), (0, 5, 10), (0, -1, 2)):
        with pytest.raises(DataError, match="does not cut sample 0"):
            split.without(slab)


def test_a_degraded_box_is_that_box_of_the_degraded_whole(store: Path) -> None:
    split, recipe = GridStore(store).split("train"), Degradation(0.4, 20.0, seed=3)
    whole = [(0, size) for size in SIZES]
    seen = [split.image(sample, whole, recipe) for sample in range(3)]
    for box in ([(2, 5), (0, 7), (3, 4)], [(0, 9), (6, 7), (0, 6)], [(3, 3), (0, 7), (0, 6)]):
        where = tuple(slice(a, b) for a, b in box)
        np.testing.assert_array_equal(split.image(1, box, recipe), seen[1][where])
    clean = [split.image(sample, whole) for sample in range(3)]
    noise = [a - b for a, b in zip(seen, clean, strict=True)]
    assert not np.allclose(noise[0], noise[1])
    other = split.image(0, whole, Degradation(0.4, 20.0, seed=4))
    assert not np.allclose(other, seen[0])
    assert GridStore(store).identity_of(None) == GridStore(store).identity
    facts = GridStore(store).identity_of(recipe)
    assert facts["facts"]["degraded"] == {"bias": 0.4, "noise": 20.0, "seed": 3}
    assert facts["fingerprint"] != GridStore(store).fingerprint


def test_bias_is_smooth_and_bounded_and_noise_is_gaussian() -> None:
    sizes = (40, 50, 30)
    recipe = Degradation(bias=0.5, noise=20.0, seed=7)
    field = recipe.field(0, sizes, (0, 0, 0), sizes)
    assert 0.9 < np.abs(field).max() < 1.05
    assert max(np.abs(np.diff(field, axis=d)).max() for d in range(3)) < 0.25
    values = np.full((*sizes, 1), 100.0, dtype=np.float32)
    noise = recipe.apply(values, 0, sizes, (0, 0, 0), [510.0])[..., 0] - 100 * (1 + 0.5 * field)
    # 60,000 draws: three standard errors.
    assert abs(noise.mean()) < 3 * 40 / 60_000**0.5
    assert abs(noise.std() - 40) < 3 * 40 / 120_000**0.5
    assert abs((noise**4).mean() / noise.std() ** 4 - 3) < 0.1
    flat = noise.reshape(-1)
    assert abs((flat[1:] * flat[:-1]).mean()) < 3 * 1600 / 60_000**0.5
    for bad in ({"bias": 1.0}, {"noise": -1.0}, {"seed": -1}, {"bias": float("nan")}):
        with pytest.raises(ConfigError):
            Degradation(**bad)
    assert torch.from_numpy(field).isfinite().all()
