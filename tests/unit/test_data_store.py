"""Preparing a store and reading it back; damage of every kind ends in a DataError, exit code 5."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from xdist.data.guard import GuardedStore, zstd_problem
from xdist.data.identity import differences, fingerprint, require_same_data
from xdist.data.prepare import compression_figures, prepare_text
from xdist.data.sources import collect, split_held_out, standard_library
from xdist.data.store import TextStore
from xdist.errors import ConfigError, DataError

CHUNK = 1024


def _text(number: int, size: int) -> bytes:
    rng = np.random.default_rng(number)
    return rng.integers(32, 127, size, dtype=np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    for number in range(20):
        path = root / ("deep" if number % 2 else ".") / f"file{number:02}.txt"
        path.write_bytes(_text(number, 300 + 37 * number))
    return root


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "store"
    prepare_text([folder], path, held_out_fraction=0.2, chunk_bytes=CHUNK)
    return path


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        f"corpus/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*.txt")
    }


def test_every_file_is_one_document_of_one_split(folder: Path, store: Path) -> None:
    opened = TextStore(store)
    opened.verify()
    seen: dict[str, bytes] = {}
    for name in opened.split_names:
        split = opened.split(name)
        for file, start, stop in zip(
            split.names, split.cu_seqlens[:-1], split.cu_seqlens[1:], strict=True
        ):
            seen[file] = split.read(int(start), int(stop)).tobytes()
        assert split.names == sorted(split.names)
        assert split.length == split.cu_seqlens[-1]
    assert opened.split_names == ["held_out", "train"]
    assert seen == _contents(folder)


def test_preparing_is_deterministic_and_sees_every_change(folder: Path, tmp_path: Path) -> None:
    def made(name: str) -> str:
        return prepare_text([folder], tmp_path / name, chunk_bytes=CHUNK).fingerprint

    found = [made("a")]
    assert made("b") == found[0]
    path = folder / "file00.txt"
    path.write_bytes(path.read_bytes()[:-1] + b"\n")
    found.append(made("c"))
    path.rename(folder / "renamed.txt")
    found.append(made("d"))
    assert len(set(found)) == 3


def test_held_out_files_do_not_move_when_files_are_added(folder: Path) -> None:
    files = collect([folder]).files
    _, few = split_held_out(files[:12], 0.3)
    _, more = split_held_out(files, 0.3)
    assert {file.name for file in few} <= {file.name for file in more}
    train, held_out = split_held_out(files[:2], 0.001)
    assert len(train) == len(held_out) == 1
    with pytest.raises(DataError, match="1 file, held_out fraction"):
        split_held_out(files[:1], 0.1)
    assert split_held_out(files[:1], 0) == (list(files[:1]), [])


def test_documents_of_a_sample(store: Path) -> None:
    split = TextStore(store).split("train")
    table = split.cu_seqlens
    for start, stop in [(0, split.length), (5, 6), (int(table[2]), int(table[4])), (0, 0)]:
        inner = [int(cut) - start for cut in table if start < cut < stop]
        assert split.documents(start, stop) == ((0, *inner, stop - start) if stop > start else (0,))


def test_reading_costs_the_slice_and_at_most_one_chunk_per_edge(store: Path) -> None:
    split = TextStore(store).split("train")
    whole = split.read(0, split.length)
    rng = np.random.default_rng(0)
    for _ in range(30):
        start, stop = sorted(rng.integers(0, split.length, 2).tolist())
        before = split.bytes_read
        np.testing.assert_array_equal(split.read(start, stop), whole[start:stop])
        read = split.bytes_read - before
        assert read >= stop - start
        assert read <= (stop - start) + 2 * (CHUNK - 1)
    before = split.bytes_read
    assert split.read(7, 7).size == 0
    assert split.bytes_read == before
    with pytest.raises(DataError, match="are not in array"):
        split.read(0, split.length + 1)


def test_chunks_of_zeros_are_stored(tmp_path: Path) -> None:
    (tmp_path / "zeros.bin").write_bytes(bytes(5000))
    prepare_text([tmp_path / "zeros.bin"], tmp_path / "s", held_out_fraction=0, chunk_bytes=CHUNK)
    assert not TextStore(tmp_path / "s").split("train").read(0, 5000).any()


def _chunk(store: Path, number: int = 1) -> Path:
    return store / "train" / "tokens" / "c" / str(number)


def test_missing_chunk_names_array_and_chunk(store: Path) -> None:
    _chunk(store).unlink()
    split = TextStore(store).split("train")
    split.read(0, CHUNK)
    with pytest.raises(DataError, match=r"chunk train/tokens/c/1 is missing") as caught:
        split.read(CHUNK - 1, CHUNK + 1)
    assert caught.value.exit_code == 5
    assert "array train/tokens" in caught.value.why


def test_every_flipped_bit_of_a_chunk_is_seen(store: Path) -> None:
    """zarr's default codec reads such a chunk as other data (OPERATIONS finding 8)."""
    path = _chunk(store)
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    places = [*range(16), *range(len(good) - 5, len(good))]
    places += rng.integers(0, len(good), 60).tolist()
    split = TextStore(store).split("train")
    right = split.read(0, 3 * CHUNK)
    seen: list[str] = []
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            found = split.read(0, 3 * CHUNK)
        except DataError as error:
            seen.append(error.what)
            continue
        # A reserved or unused header bit that the format tells decoders to ignore.
        np.testing.assert_array_equal(found, right)
        assert place < 6
    assert all("train/tokens/c/1" in what for what in seen)
    assert len(seen) > len(places) - 6
    for size in (0, 3, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(DataError, match="damaged"):
            split.read(CHUNK, CHUNK + 1)
    path.write_bytes(good)
    np.testing.assert_array_equal(split.read(0, 3 * CHUNK), right)


def test_swapped_chunks_are_seen_by_verify(store: Path) -> None:
    one, two = _chunk(store, 0), _chunk(store, 1)
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    with pytest.raises(DataError, match="is not the one that was prepared"):
        TextStore(store).verify()


def test_bombs_and_links_are_refused_before_decoding(store: Path, tmp_path: Path) -> None:
    path = _chunk(store)
    good = path.read_bytes()
    codec = zarr.codecs.ZstdCodec(level=3, checksum=True)._zstd_codec
    large = codec.encode(bytes(1 << 28))
    assert "announces 268435456 bytes, want 1024" in zstd_problem(large, CHUNK)
    assert zstd_problem(good + large, CHUNK).endswith(f"its frame ends at {len(good)}")
    unchecked = zarr.codecs.ZstdCodec(level=3, checksum=False)._zstd_codec.encode(bytes(CHUNK))
    assert "no checksum" in zstd_problem(unchecked, CHUNK)
    split = TextStore(store).split("train")
    for bad in (large, good + large, unchecked):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="train/tokens/c/1"):
            split.read(CHUNK, CHUNK + 1)
    outside = tmp_path / "outside"
    outside.write_bytes(good)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the store"):
        split.read(CHUNK, CHUNK + 1)


def test_a_read_that_goes_around_the_checks_is_an_error(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = TextStore(store).split("train")
    monkeypatch.delattr(GuardedStore, "get")
    with pytest.raises(DataError, match="past its checks"):
        split.read(0, 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"zarr_format": 2}, "not zarr format 3"),
        ({"node_type": "group"}, "not a zarr array"),
        ({"data_type": "string"}, "dtype 'string'"),
        ({"codecs": [{"name": "vlen-utf8"}]}, "codecs"),
        ({"codecs": [{"name": "bytes"}, {"name": "zstd"}]}, "with a checksum"),
        ({"shape": [-1]}, "shape"),
        ({"shape": [1 << 60]}, "shape"),
        ({"shape": [9, 9]}, "of 1 dims"),
        ({"storage_transformers": [{"name": "x"}]}, "storage transformers"),
        (
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1 << 40]}}},
            "chunks of",
        ),
        ({"chunk_key_encoding": {"name": "v2"}}, "keys c/0"),
        ({"shape": [17]}, "changed after it was prepared"),
    ],
)
def test_metadata_outside_the_lists_are_refused(store: Path, change: dict, text: str) -> None:
    path = store / "train" / "tokens" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=text):
        TextStore(store).split("train")


def test_stores_that_are_not_stores_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TextStore(tmp_path / "nothing")
    with pytest.raises(DataError, match="not a local path"):
        TextStore("s3://bucket/store")
    with pytest.raises(DataError, match="no zarr group"):
        TextStore(tmp_path)
    with pytest.raises(DataError, match="no split 'test'"):
        TextStore(store).split("test")
    path = store / "zarr.json"
    path.write_text(path.read_text().replace('"vocabulary_size": 256', '"vocabulary_size": 128'))
    with pytest.raises(DataError, match=r"fingerprint of .* does not fit"):
        TextStore(store)
    path.write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(DataError, match="not a store this version reads"):
        TextStore(store)


def test_token_ids(tmp_path: Path) -> None:
    one = np.arange(5000, dtype=np.int64) % 3000
    two = np.arange(77, dtype=np.uint16)
    for name, ids in (("one", one), ("two", two)):
        np.save(tmp_path / f"{name}.npy", ids)
    files = [tmp_path / "one.npy", tmp_path / "two.npy"]
    made = prepare_text(
        files, tmp_path / "s", vocabulary_size=3000, held_out_fraction=0, chunk_bytes=CHUNK
    )
    assert made.tokens == {"train": 5077}
    split = TextStore(tmp_path / "s").split("train")
    assert split.dtype == np.uint16
    np.testing.assert_array_equal(split.read(0, 5077), np.concatenate([one, two]))
    assert made.figures == {}
    with pytest.raises(DataError, match="ids from 0 to 2999, vocabulary size 2999"):
        prepare_text(files, tmp_path / "t", vocabulary_size=2999, held_out_fraction=0)
    np.save(tmp_path / "floats.npy", np.zeros(3))
    with pytest.raises(DataError, match="does not hold token ids"):
        prepare_text(
            [tmp_path / "floats.npy"], tmp_path / "t", vocabulary_size=9, held_out_fraction=0
        )
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a \.npy file of token ids"):
        prepare_text(
            [tmp_path / "object.npy"], tmp_path / "t", vocabulary_size=9, held_out_fraction=0
        )
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["s"]


def test_a_token_outside_the_vocabulary_names_its_place(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3000) % 3000)
    path = tmp_path / "s"
    prepare_text(
        [tmp_path / "ids.npy"], path, vocabulary_size=3000, held_out_fraction=0, chunk_bytes=CHUNK
    )
    tokens = zarr.open_array(path / "train" / "tokens", mode="r+")
    tokens[700] = 3001
    split = TextStore(path).split("train")
    split.read(0, 700)
    with pytest.raises(DataError, match=r"token 3001 at position 700 \(chunk train/tokens/c/1\)"):
        split.read(650, 800)


def test_a_store_in_the_way(folder: Path, store: Path, tmp_path: Path) -> None:
    options = {"held_out_fraction": 0.2, "chunk_bytes": CHUNK}
    with pytest.raises(DataError, match="exists"):
        prepare_text([folder], store, **options)
    assert prepare_text([folder], store, existing="keep", **options).kept
    with pytest.raises(DataError, match="other data than these sources"):
        prepare_text([folder], store, existing="keep", held_out_fraction=0.5)
    (folder / "new.txt").write_text("more text")
    with pytest.raises(DataError, match="other data than these sources"):
        prepare_text([folder], store, existing="keep", **options)
    before = TextStore(store).fingerprint
    made = prepare_text([folder], store, existing="replace", **options)
    assert not made.kept
    assert TextStore(store).fingerprint == made.fingerprint != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "store"]


def test_a_store_is_not_kept_when_a_file_changed_at_its_size(
    folder: Path, store: Path, tmp_path: Path
) -> None:
    options = {"held_out_fraction": 0.2, "chunk_bytes": CHUNK, "existing": "keep"}
    seen = []
    prepare_text([folder], store, **options, on_progress=lambda done, whole: seen.append(done))
    assert seen[-1] == sum(len(data) for data in _contents(folder).values())
    file = folder / "file00.txt"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match="changed at the same sizes: sha256"):
        prepare_text([folder], store, **options)
    file.write_bytes(data[:-1])
    with pytest.raises(DataError, match=f"tokens, split .* holds {len(data)} of it"):
        prepare_text([folder], store, **options)

    ids = tmp_path / "ids.npy"
    options |= {"held_out_fraction": 0, "vocabulary_size": 300}
    np.save(ids, np.arange(300))
    prepare_text([ids], tmp_path / "ids", **options)
    np.save(ids, np.arange(300).astype(np.int32))
    assert prepare_text([ids], tmp_path / "ids", **options).kept
    np.save(ids, np.arange(300)[::-1])
    with pytest.raises(DataError, match="changed at the same sizes"):
        prepare_text([ids], tmp_path / "ids", **options)


def test_a_failure_leaves_the_old_store_and_nothing_beside_it(
    folder: Path, store: Path, tmp_path: Path
) -> None:
    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    before = TextStore(store).fingerprint
    with pytest.raises(KeyboardInterrupt):
        prepare_text([folder], store, existing="replace", on_progress=fail)
    assert TextStore(store).fingerprint == before
    TextStore(store).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "store"]


def test_sources_pass_over_what_is_not_text_and_say_so(folder: Path) -> None:
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"\x7fELF\0")
    (folder / "link.txt").symlink_to(folder / "file00.txt")
    found = collect([folder])
    assert len(found.files) == 20
    reasons = sorted(line.split(": ", 1)[1] for line in found.skipped)
    assert reasons == ["empty", "not a regular file", "not text: it holds NUL bytes"]
    assert len(collect([folder], text_only=False).files) == 21
    assert len(collect([folder / "binary.txt"]).files) == 1
    assert len(collect([folder / "link.txt"]).files) == 1
    with pytest.raises(DataError, match="cannot be used"):
        collect([folder / "absent.txt"])
    with pytest.raises(DataError, match="two files would have the name"):
        collect([folder / "file00.txt", folder / "file00.txt"])
    with pytest.raises(DataError, match="no file was found"):
        prepare_text([folder], folder.parent / "x", pattern="*.md")
    for wrong in ({"held_out_fraction": 1.0}, {"chunk_bytes": 1}, {"vocabulary_size": 1}):
        with pytest.raises(ConfigError):
            prepare_text([folder], folder.parent / "x", **wrong)


def test_the_standard_library_is_found_whole() -> None:
    found = standard_library()
    names = {file.name for file in found.files}
    assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= names
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    assert found.total_bytes > 5_000_000
    assert found == standard_library()


def test_figures_of_known_bytes() -> None:
    uniform = np.random.default_rng(0).integers(0, 256, 1 << 18, dtype=np.uint8)
    figures = compression_figures(uniform)
    assert figures["order0_bits_per_byte"] == pytest.approx(8, abs=0.01)
    assert figures["xz_bits_per_byte"] > 8
    pair = compression_figures(np.tile(np.array([3, 9], dtype=np.uint8), 5000))
    assert pair["order0_bits_per_byte"] == pytest.approx(1)
    assert pair["xz_bits_per_byte"] < 0.2


def test_changed_data_are_named(store: Path, folder: Path, tmp_path: Path) -> None:
    """Failure 9: exit code 5, both fingerprints, what differs."""
    saved = json.loads(json.dumps(TextStore(store).identity))
    assert require_same_data(saved, TextStore(store).identity) == []
    (folder / "new.txt").write_text("more text")
    prepare_text([folder], tmp_path / "new", held_out_fraction=0.2, chunk_bytes=CHUNK)
    current = TextStore(tmp_path / "new").identity
    with pytest.raises(DataError) as caught:
        require_same_data(saved, current)
    text = str(caught.value)
    assert caught.value.exit_code == 5
    assert saved["fingerprint"][:16] in text
    assert current["fingerprint"][:16] in text
    changed = differences(saved["facts"], current["facts"])
    assert any(".documents: " in line for line in changed)
    assert all(line in text for line in changed)
    assert "allow_fingerprint_change" in text
    (line,) = require_same_data(saved, current, allow_change=True)
    assert "allowed by the config" in line
    assert fingerprint(saved["facts"]) == saved["fingerprint"]
