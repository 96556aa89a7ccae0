"""Checkpoints made to do harm: correctly sealed and hashed, and refused all the same. Nothing in
them is ever run, followed out of the folder, or allocated for because it says so."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xdist.checkpoint.manifest import entry_of
from xdist.checkpoint.read import load, load_latest, open_checkpoint
from xdist.checkpoint.write import save
from xdist.errors import CheckpointError
from xdist.train.metrics import PeakMemory

MODEL = "rank-00000-model-00001.safetensors"


class Malicious:
    """Unpickling it makes a folder: what an attacker's code could do instead."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint."""
    tensors = {"model/w": torch.arange(12.0).reshape(3, 4), "model/b": torch.ones(5)}
    return save(tmp_path / "checkpoints", 3, tensors, {"a": 1})


def _body(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def _seal(path: Path, body: dict[str, Any]) -> None:
    """Write the manifest as one who knows the format: with a right seal."""
    body.pop("seal", None)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["seal"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body))


def _put(path: Path, name: str, data: bytes) -> None:
    """Replace a file and list it rightly."""
    (path / name).write_bytes(data)
    body = _body(path)
    body["files"][name] = entry_of(data)._asdict()
    _seal(path, body)


@pytest.mark.parametrize("name", [MODEL, "state.json", "manifest.json"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_under_a_checkpoints_name_is_never_run(
    path: Path, tmp_path: Path, name: str, protocol: int
) -> None:
    marker = tmp_path / "owned"
    data = pickle.dumps({"model/w": Malicious(marker)}, protocol=protocol)
    if name == "manifest.json":
        (path / name).write_bytes(data)
    else:
        _put(path, name, data)
    with pytest.raises(CheckpointError):
        load(path)
    with pytest.raises(CheckpointError, match="none of them is whole"):
        load_latest(path.parent)
    assert not marker.exists()
    # The same bytes do run when they are unpickled: the test feeds the real thing.
    pickle.loads(data)
    assert marker.exists()


def test_a_file_of_torch_save_under_a_checkpoints_name_is_refused(path: Path) -> None:
    torch.save({"model/w": torch.zeros(3, 4)}, path / MODEL)
    _put(path, MODEL, (path / MODEL).read_bytes())
    with pytest.raises(CheckpointError, match="announces a header"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "a/../../outside.safetensors",
        "..",
        "a\\..\\b.safetensors",
        "x.safetensors\n",
        "x.safetensors\0.json",
        "ü.safetensors",
        "x.pt",
        "x.bin",
        "x.pkl",
        ".hidden.safetensors",
    ],
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(path: Path, name: str) -> None:
    outside = path.parent / "outside.safetensors"
    outside.write_bytes((path / MODEL).read_bytes())
    body = _body(path)
    body["files"][name] = body["files"].pop(MODEL)
    for tensor in body["tensors"].values():
        tensor["runs"] = [[start, length, name] for start, length, _ in tensor["runs"]]
    _seal(path, body)
    with pytest.raises(CheckpointError, match="only plain names are read"):
        load(path)


def test_a_manifest_cannot_reach_files_it_does_not_list(path: Path) -> None:
    body = _body(path)
    body["tensors"]["model/w"]["runs"] = [[0, 12, "../outside.safetensors"]]
    _seal(path, body)
    with pytest.raises(CheckpointError, match="a file it lacks"):
        load(path)


@pytest.mark.parametrize("name", [MODEL, "state.json", "manifest.json"])
def test_links_are_not_followed(path: Path, name: str) -> None:
    outside = path.parent / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load(path)


def test_a_linked_folder_and_a_fifo_are_refused(path: Path) -> None:
    link = path.parent / "step-00000004"
    link.symlink_to(path)
    with pytest.raises(CheckpointError, match="not a folder of a checkpoint"):
        load(link)
    (path / MODEL).unlink()
    os.mkfifo(path / MODEL)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(path)


def _runs(name: str, runs: list[list[Any]]) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["tensors"][name]["runs"] = runs

    return change


def _spec(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["tensors"][name] |= values

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_runs("model/w", [[0, 12, MODEL], [0, 12, MODEL]]), "more than one run"),
        (_runs("model/w", [[0, 7, MODEL], [5, 7, MODEL]]), "more than one run"),
        (_runs("model/w", [[0, 5, MODEL], [7, 5, MODEL]]), "no file holds its element 5"),
        (_runs("model/w", [[0, 5, MODEL], [5, 7, MODEL]]), "does not hold model/w@0"),
        (_runs("model/w", [[0, 0, MODEL], [0, 12, MODEL]]), "more than one run"),
        (_runs("model/w", []), "end at element 0 of 12"),
        (_runs("model/w", [[-1, 12, MODEL]]), "out of range"),
        (_runs("model/w", [[0, 1 << 62, MODEL]]), "out of range"),
        (_runs("model/w", [[0.0, 12, MODEL]]), "out of range"),
        (_runs("model/w", [[False, 12, MODEL]]), "out of range"),
        (_runs("model/w", [[0, 12]]), "without shape, dtype and runs"),
        (_runs("model/w", [[0, 12, [MODEL]]]), "without shape, dtype and runs"),
        (_runs("model/w", [[0, 12, "state.json"]]), "does not hold model/w@0"),
        (_spec("model/w", shape=[1 << 40, 1 << 40]), "end at element 12"),
        (_spec("model/w", shape=[-3, -4]), "out of range"),
        (_spec("model/w", dtype="O"), "without shape, dtype and runs"),
        (_spec("model/w", dtype="I32"), "does not hold model/w@0"),
        (lambda body: body["tensors"].pop("model/w"), "does not list"),
        (lambda body: body.update(tensors=[]), "lists no tensors"),
        (lambda body: body.update(version=3), "version 1 or 2"),
        (lambda body: body.update(version=True), "another format"),
        (lambda body: body["files"][MODEL].update(bytes=1 << 60), "size mismatch"),
        (lambda body: body["files"][MODEL].update(bytes=-1), "without a size"),
        (lambda body: body["files"][MODEL].update(bytes=1.5), "without a size"),
        (lambda body: body["files"]["state.json"].update(bytes=1 << 40), "too large"),
        (lambda body: body["files"].pop("state.json"), "lists no state"),
    ],
)
def test_a_forged_manifest_is_refused(
    path: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    body = _body(path)
    change(body)
    _seal(path, body)
    with pytest.raises(CheckpointError, match=text):
        load(path)


def test_a_name_that_comes_twice_is_refused(path: Path) -> None:
    """JSON readers keep the last; two readers could then see two checkpoints."""
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 3', '"step": 9, "step": 3'))
    with pytest.raises(CheckpointError, match="not a manifest"):
        load(path)
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    header += b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (path / "manifest.json").write_text(text)
    _put(path, MODEL, struct.pack("<Q", len(header)) + header + b"1")
    with pytest.raises(CheckpointError, match="no safetensors header"):
        load(path)


def _safetensors(size: int) -> bytes:
    return struct.pack("<Q", size) + b"{}"


def test_a_header_over_the_cap_is_refused_before_it_is_read(path: Path) -> None:
    """Announced, and really there: 100 MB and a byte of it."""
    _put(path, MODEL, _safetensors(1 << 62))
    with pytest.raises(CheckpointError, match="announces a header of 4611686018427387904"):
        load(path)
    over = 100_000_001
    with (path / MODEL).open("wb") as file:
        file.write(_safetensors(over))
        file.truncate(8 + over)
    with (path / MODEL).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    body = _body(path)
    body["files"][MODEL] = {"bytes": 8 + over, "sha256": digest}
    _seal(path, body)
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.peak_bytes()
    with pytest.raises(CheckpointError, match=f"announces a header of {over}"):
        load(path)
    assert memory.peak_bytes() - before < 50 << 20


def test_deep_json_is_refused(path: Path) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    _put(path, "state.json", b'{"a":' + deep + b"}")
    with pytest.raises(CheckpointError, match="not JSON"):
        load(path)
    (path / "manifest.json").write_bytes(deep)
    with pytest.raises(CheckpointError, match="not a manifest"):
        load(path)


def test_a_bomb_is_refused_by_what_the_model_can_need(path: Path) -> None:
    """A file full of holes: 64 GiB by its size, nothing on the disk. Not a byte of it is read."""
    huge = 64 << 30
    with (path / MODEL).open("wb") as file:
        file.truncate(huge)
    body = _body(path)
    body["files"][MODEL] = {"bytes": huge, "sha256": "0" * 64}
    _seal(path, body)
    with pytest.raises(CheckpointError, match="larger than this model can need"):
        open_checkpoint(path, max_bytes=1 << 30)


def test_truth_values_are_zero_or_one(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"model/flags": torch.tensor([True, False])}, {})
    data = (path / MODEL).read_bytes()
    _put(path, MODEL, data[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match="truth values"):
        load(path)
