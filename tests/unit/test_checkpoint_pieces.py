"""One checkpoint of many ranks: every element once, seen by any reader of safetensors, read
tensor by tensor; folders of the first format still load."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from xdist.checkpoint.pieces import Piece, Spec
from xdist.checkpoint.read import load, load_latest, open_checkpoint
from xdist.checkpoint.write import Part, abandon, publish, save, start_folder, write_part
from xdist.errors import CheckpointError
from xdist.train.metrics import PeakMemory

FIRST_FORMAT = Path(__file__).parent / "checkpoint_version_1"
WHOLE = {
    "model/weight": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "model/half": torch.arange(9).to(torch.bfloat16),
    "model/flags": torch.tensor([True, False, True]),
    "model/empty": torch.zeros(0, 3),
    "optimizer/updates/weight": torch.tensor(3.0),
}
SPECS = {name: Spec(tuple(t.shape), t.dtype) for name, t in WHOLE.items()}


def _piece(name: str, start: int, stop: int) -> Piece:
    return Piece(SPECS[name].shape, start, WHOLE[name].reshape(-1)[start:stop])


# Three ranks: uneven runs that cut rows, one rank that holds none of a tensor.
RANKS: list[dict[str, Piece]] = [
    {
        "model/weight": _piece("model/weight", 0, 13),
        "model/half": _piece("model/half", 4, 9),
        "optimizer/updates/weight": _piece("optimizer/updates/weight", 0, 1),
    },
    {"model/weight": _piece("model/weight", 30, 35), "model/flags": _piece("model/flags", 0, 3)},
    {
        "model/weight": _piece("model/weight", 13, 30),
        "model/half": _piece("model/half", 0, 4),
        "model/empty": _piece("model/empty", 0, 0),
    },
]


def _save(directory: Path, ranks: list[dict[str, Piece]], step: int = 7) -> Path:
    folder = start_folder(directory, step, SPECS, {"a": 1})
    try:
        parts = [write_part(folder, rank, pieces) for rank, pieces in enumerate(ranks)]
        # As they travel between ranks.
        told = [Part(*row) for row in json.loads(json.dumps(parts))]
        return publish(folder, step, SPECS, told, {"a": 1})
    finally:
        abandon(folder)


def test_pieces_of_three_ranks_are_one_checkpoint(tmp_path: Path) -> None:
    path = _save(tmp_path, RANKS)
    found = load(path)
    assert found.specs == SPECS
    for name, tensor in WHOLE.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name
    files = sorted(file.name for file in path.iterdir())
    assert files == [
        "manifest.json",
        "rank-00000-model-00001.safetensors",
        "rank-00000-optimizer-00001.safetensors",
        "rank-00001-model-00001.safetensors",
        "rank-00002-model-00001.safetensors",
        "state.json",
    ]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["tensors"]["model/weight"] == {
        "shape": [7, 5],
        "dtype": "F32",
        "runs": [
            [0, 13, "rank-00000-model-00001.safetensors"],
            [13, 17, "rank-00002-model-00001.safetensors"],
            [30, 5, "rank-00001-model-00001.safetensors"],
        ],
    }


def test_any_reader_of_safetensors_reads_the_files(tmp_path: Path) -> None:
    path = _save(tmp_path, RANKS)
    with safe_open(path / "rank-00002-model-00001.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["model/half@0", "model/weight@13"]
        assert torch.equal(
            file.get_tensor("model/weight@13"), WHOLE["model/weight"].flatten()[13:30]
        )
        assert torch.equal(file.get_tensor("model/half@0"), WHOLE["model/half"][:4])


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = _save(tmp_path / "run" / "checkpoints", RANKS)
    for folder in (path, path.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("rank", "name", "piece", "text"),
    [
        (0, "model/weight", _piece("model/weight", 0, 12), "no file holds its element 12"),
        (0, "model/weight", _piece("model/weight", 1, 13), "no file holds its element 0"),
        (
            0,
            "model/weight",
            _piece("model/weight", 0, 14),
            "more than one run holds its element 13",
        ),
        (1, "model/weight", _piece("model/weight", 30, 34), "end at element 34 of 35"),
        (1, "model/half", _piece("model/half", 0, 4), "more than one run holds its element 0"),
        (1, "model/alien", _piece("model/half", 0, 4), "model/alien is in no specification"),
    ],
)
def test_elements_that_are_missing_or_double_fail_the_save(
    tmp_path: Path, rank: int, name: str, piece: Piece, text: str
) -> None:
    ranks = [dict(pieces) for pieces in RANKS]
    ranks[rank][name] = piece
    with pytest.raises(CheckpointError, match=text):
        _save(tmp_path, ranks)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_first_rank_does_not_see_fails_the_save(tmp_path: Path) -> None:
    """Another host's folder is not this one."""
    folder = start_folder(tmp_path, 7, SPECS, {})
    parts = [write_part(folder, rank, pieces) for rank, pieces in enumerate(RANKS)]
    (folder / "rank-00002-model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rank-00002-model-00001") as caught:
        publish(folder, 7, SPECS, parts, {})
    assert "a file system that all hosts share" in caught.value.do


def test_folders_of_the_first_format_still_load(tmp_path: Path) -> None:
    """Written by the version before this one; its files hold whole tensors."""
    shutil.copytree(FIRST_FORMAT, tmp_path / "checkpoints")
    found = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert (found.step, found.state) == (3, {"sample_cursor": 6, "step": 3})
    twelve = torch.arange(12.0).reshape(3, 4)
    wanted = {
        "model/weight": twelve / 7,
        "model/half": torch.arange(5).to(torch.bfloat16),
        "model/scalar": torch.tensor(2.5),
        "model/empty": torch.zeros(0, 3),
        "optimizer/exp_avg/weight": -twelve,
        "optimizer/updates/weight": torch.tensor(3.0),
    }
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found.tensors[name], tensor)
    # A new save beside it, in the new format; the older one is kept.
    save(tmp_path / "checkpoints", 4, wanted, {})
    assert [open_checkpoint(p).step for p in sorted((tmp_path / "checkpoints").iterdir())] == [3, 4]


def test_a_file_changed_after_it_was_hashed_is_not_read(tmp_path: Path) -> None:
    path = _save(tmp_path, RANKS)
    found = open_checkpoint(path)
    file = path / "rank-00001-model-00001.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        found.read("model/weight")
    assert torch.equal(found.read("model/half"), WHOLE["model/half"])


def test_opening_and_reading_hold_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Eight tensors of 16 MiB: hashing makes none of them, reading one at a time."""
    one = 16 << 20
    tensors = {f"model/{i}": torch.full((one // 4,), float(i)) for i in range(8)}
    path = save(tmp_path, 1, tensors, {}, max_file_bytes=3 * one)
    tensors.clear()
    memory = PeakMemory(torch.device("cpu"))
    assert memory.exact
    memory.start()
    before = memory.peak_bytes()
    found = open_checkpoint(path)
    assert memory.peak_bytes() - before < one
    for name in found.specs:
        tensor = found.read(name)
        assert tensor[-1] == float(name[6:])
        del tensor
    assert memory.peak_bytes() - before < 2 * one
