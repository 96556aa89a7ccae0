"""Stores made to do harm: bombs, pickles, links, addresses. Refused before they can."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from xdist.data import TextStore
from xdist.data.guard import MAX_CHUNK_BYTES, check_array, zstd_problem
from xdist.data.prepare import prepare_text
from xdist.errors import DataError
from xdist.train.metrics import PeakMemory

CHUNK = 1024
RLE_BYTES = 128 << 10


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "text.bin").write_bytes(bytes(range(256)) * 40)
    prepare_text([tmp_path / "text.bin"], tmp_path / "s", held_out_fraction=0, chunk_bytes=CHUNK)
    return tmp_path / "s"


def _bomb(inflates_to: int, announces: int) -> bytes:
    """A zstd frame of 4 bytes for each 128 KiB: blocks of one repeated byte (RFC 8878, 3.1.1.2)."""
    single_segment, checksum, size_of_8_bytes = 1 << 5, 1 << 2, 3 << 6
    head = b"\x28\xb5\x2f\xfd" + bytes([single_segment | checksum | size_of_8_bytes])
    blocks = inflates_to // RLE_BYTES
    body = b"".join(
        ((RLE_BYTES << 3 | 1 << 1 | (i == blocks - 1)).to_bytes(3, "little") + b"A")
        for i in range(blocks)
    )
    return head + announces.to_bytes(8, "little") + body + b"\0\0\0\0"


def _peak(call) -> int:
    memory = PeakMemory(torch.device("cpu"))
    assert memory.exact
    memory.start()
    before = memory.peak_bytes()
    call()
    return memory.peak_bytes() - before


def test_a_bomb_that_says_what_it_holds_is_refused_before_it_is_decoded(store: Path) -> None:
    """64 KiB on the disk, 2 GiB decoded, and honest about it: not what the chunk's shape allows."""
    bomb = _bomb(2 << 30, announces=2 << 30)
    assert len(bomb) < 70_000
    split = TextStore(store).split("train")
    split.read(0, 1)
    (store / "train" / "tokens" / "c" / "1").write_bytes(bomb)

    def read() -> None:
        with pytest.raises(DataError) as caught:
            split.read(CHUNK, CHUNK + 1)
        assert "train/tokens/c/1" in caught.value.what

    assert _peak(read) < 64 << 20
    (store / "train" / "tokens" / "c" / "1").write_bytes(_bomb(8 << 20, announces=8 << 20))
    with pytest.raises(DataError, match="announces 8388608 bytes, want 1024"):
        split.read(CHUNK, CHUNK + 1)


def test_a_bomb_that_lies_about_its_size_never_gets_the_memory(store: Path) -> None:
    """It announces the chunk's 1024 bytes and would inflate to 32 MiB, in a file of 1 KiB."""
    bomb = _bomb(32 << 20, announces=CHUNK)
    assert len(bomb) < 2 * CHUNK
    assert zstd_problem(bomb, CHUNK).endswith("would decode to 33554432 bytes, want 1024")
    split = TextStore(store).split("train")
    split.read(0, 1)
    (store / "train" / "tokens" / "c" / "1").write_bytes(bomb)

    def read() -> None:
        with pytest.raises(DataError) as caught:
            split.read(CHUNK, CHUNK + 1)
        assert caught.value.exit_code == 5

    assert _peak(read) < 16 << 20


def test_a_compressed_block_that_lies_is_stopped_by_the_announced_size(store: Path) -> None:
    """Its sequences inflate: only decoding tells, into no more than the announced bytes."""
    codec = zarr.codecs.ZstdCodec(level=3, checksum=True)._zstd_codec
    long = bytes(np.tile(np.frombuffer(os.urandom(64), np.uint8), 1024))
    data = bytearray(codec.encode(long))
    flag, single = data[4] >> 6, data[4] >> 5 & 1
    assert (flag, single) in ((1, 1), (2, 1))
    width = 2 if flag == 1 else 4
    data[5 : 5 + width] = (CHUNK - (256 if flag == 1 else 0)).to_bytes(width, "little")
    assert zstd_problem(bytes(data), CHUNK) == ""
    (store / "train" / "tokens" / "c" / "1").write_bytes(data)
    split = TextStore(store).split("train")
    with pytest.raises(DataError, match="chunk train/tokens/c/1 of array train/tokens is damaged"):
        split.read(CHUNK, CHUNK + 1)


def _metadata(store: Path, **change: object) -> None:
    path = store / "train" / "tokens" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _grid(length: int) -> dict:
    return {"name": "regular", "configuration": {"chunk_shape": [length]}}


def test_chunks_beyond_512_mib_are_refused_by_their_declared_shape(store: Path) -> None:
    """Before a chunk is read: a tiny file could hold it."""
    assert MAX_CHUNK_BYTES == 512 << 20
    (store / "train" / "tokens" / "c" / "0").write_bytes(_bomb(1 << 30, announces=1 << 30))
    _metadata(store, chunk_grid=_grid((512 << 20) + 1))
    with pytest.raises(DataError, match="536870912 bytes"):
        TextStore(store).split("train")
    _metadata(store, chunk_grid=_grid(512 << 20))
    assert check_array(store, "train/tokens").chunk_bytes == 512 << 20
    _metadata(store, chunk_grid=_grid(128 << 20), data_type="int64")
    with pytest.raises(DataError, match="536870912 bytes"):
        check_array(store, "train/tokens")


class Malicious:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}],
        [{"name": "bytes"}, {"name": "numcodecs.pickle"}],
        [{"name": "vlen-bytes"}],
        [{"name": "bytes"}, {"name": "blosc"}],
        [{"name": "sharding_indexed"}],
        [{"name": "bytes"}, {"name": "nobody.knows.this"}],
        [],
    ],
)
def test_pickle_and_unknown_codecs_are_refused_and_not_looked_up(
    store: Path, tmp_path: Path, codecs: list
) -> None:
    marker = tmp_path / "owned"
    (store / "train" / "tokens" / "c" / "0").write_bytes(pickle.dumps(Malicious(str(marker))))
    _metadata(store, codecs=codecs)
    with pytest.raises(DataError):
        TextStore(store).split("train")
    _metadata(store, codecs=codecs, data_type="object")
    with pytest.raises(DataError, match=r"dtype 'object'|not as expected"):
        TextStore(store).split("train")
    assert not marker.exists()


def test_a_store_of_format_2_with_a_pickle_codec_is_refused(tmp_path: Path) -> None:
    """The real thing: an object array of zarr 2 whose chunk is a pickle."""
    marker = tmp_path / "owned"
    root = tmp_path / "old"
    array = root / "train" / "tokens"
    array.mkdir(parents=True)
    chunk = pickle.dumps([Malicious(str(marker)), "|O", [1]])
    (array / "0").write_bytes(chunk)
    fields = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C"}
    fields |= {"compressor": None, "fill_value": None, "filters": [{"id": "pickle", "protocol": 5}]}
    (array / ".zarray").write_text(json.dumps(fields))
    for folder in (root, root / "train"):
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(DataError, match=r"no zarr group|zarr\.json is missing"):
        TextStore(root)
    (root / "zarr.json").write_text(json.dumps(fields | {"node_type": "group"}))
    with pytest.raises(DataError, match="not zarr format 3"):
        TextStore(root)
    assert not marker.exists()


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/store",
        "gs://bucket/store",
        "http://127.0.0.1:1/store",
        "https://example.com/store.zarr",
        "file:///etc",
        "memory://x",
        "simplecache::s3://bucket/store",
    ],
)
def test_remote_addresses_are_refused(address: str) -> None:
    with pytest.raises(DataError, match="not a local path") as caught:
        TextStore(address)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", ["zarr.json", "train/tokens/zarr.json", "train/tokens/c/0"])
def test_links_out_of_the_store_are_not_followed(store: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (store / name).rename(outside)
    (store / name).symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the store"):
        TextStore(store).split("train").read(0, 10)


def test_a_folder_linked_out_of_the_store_is_not_followed(store: Path, tmp_path: Path) -> None:
    (store / "train" / "tokens" / "c").rename(tmp_path / "c")
    (store / "train" / "tokens" / "c").symlink_to(tmp_path / "c")
    with pytest.raises(DataError, match="leads out of the store"):
        TextStore(store).split("train").read(0, 10)
