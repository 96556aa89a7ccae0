"""A store written in parts, in any order, is byte for byte the one that is written in one go."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdist.data import parts
from xdist.data.prepare import prepare_text
from xdist.data.sources import Source, Sources
from xdist.data.store import TextStore
from xdist.errors import DataError


def backwards(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Do the work in a drawn order, give the results in the order of the arguments."""
    order = random.Random(0).sample(range(len(arguments)), len(arguments))
    results = {index: function(*arguments[index]) for index in order}
    return (results[index] for index in range(len(arguments)))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 2048)


def test_bytes_in_parts_make_the_same_store(tmp_path: Path, small_parts: None) -> None:
    draw = random.Random(1)
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        size = draw.choice([0, 1, 700, 1024, 5000])
        # Whole chunks of zeros are written like any other.
        data = b"\0" * size if number % 5 == 0 else draw.randbytes(size)
        (text / f"{number:02}.bin").write_bytes(data.replace(b"\0", b"z") if number % 5 else data)
    sources = [Source(path.name, path, path.stat().st_size) for path in sorted(text.iterdir())]
    chosen = Sources(tuple(sources), ())
    options: dict[str, Any] = {"held_out_fraction": 0.3, "chunk_bytes": 1024}
    told: list[tuple[int, int]] = []
    one = prepare_text(chosen, tmp_path / "one", **options)
    many = prepare_text(
        chosen,
        tmp_path / "many",
        **options,
        each=backwards,
        on_progress=lambda *pair: told.append(pair),
    )
    assert many.fingerprint == one.fingerprint
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert told[-1] == (sum(s.size_bytes for s in sources),) * 2
    TextStore(tmp_path / "many").verify()


def test_token_ids_in_parts_make_the_same_store(tmp_path: Path, small_parts: None) -> None:
    draw = np.random.default_rng(2)
    for number, size in enumerate([3000, 0, 17, 2500]):
        np.save(tmp_path / f"{number}.npy", draw.integers(0, 700, size))
    files = sorted(tmp_path.glob("*.npy"))
    options: dict[str, Any] = {"vocabulary_size": 700, "held_out_fraction": 0, "chunk_bytes": 1024}
    prepare_text(files, tmp_path / "one", **options)
    prepare_text(files, tmp_path / "many", **options, each=backwards)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    with pytest.raises(DataError, match="outside the vocabulary"):
        prepare_text(files, tmp_path / "bad", **options | {"vocabulary_size": 600}, each=backwards)
    assert not (tmp_path / "bad").exists()


def test_a_file_that_changes_before_its_part_is_read_is_refused(
    tmp_path: Path, small_parts: None
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"text " * 1000)

    def late(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        file.write_bytes(b"text " * 900)
        return backwards(function, arguments)

    with pytest.raises(DataError, match="changed while it was read"):
        prepare_text([file], tmp_path / "s", held_out_fraction=0, chunk_bytes=1024, each=late)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
