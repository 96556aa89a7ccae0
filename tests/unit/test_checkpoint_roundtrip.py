"""Saving and loading: every bit back, the newest kept, nothing but plain listed files read."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import signal
import stat
import struct
from pathlib import Path
from types import ModuleType

import pytest
import torch

import xdist.checkpoint
import xdist.checkpoint.write as writing
import xdist.data
from xdist.checkpoint.manifest import FileEntry, parse, render
from xdist.checkpoint.pieces import Piece, Spec
from xdist.checkpoint.read import load, load_latest
from xdist.checkpoint.write import save
from xdist.config import Checkpoint
from xdist.errors import CheckpointError, NumericsError
from xdist.mesh import Mesh
from xdist.train.saving import Outcome, Saving

STATE = {"cursor": 12, "text": "é", "pi": 3.141592653589793, "tiny": 5e-324, "list": [1, None]}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 4, generator=draw)
    return {
        "model/weight": torch.randn(33, 17, generator=draw),
        "model/bf16": torch.randn(5, 3, generator=draw).to(torch.bfloat16),
        "model/f64": torch.randn(7, generator=draw, dtype=torch.float64),
        "model/f16": torch.randn(3, generator=draw).half(),
        "model/scalar": torch.tensor(2.5),
        "model/empty": torch.zeros(0, 3),
        "model/view": base[1:3],
        "model/transposed": base.t(),
        "model/same": base,
        "model/zero": torch.tensor([0.0, -0.0, 1e-45]),
        "optimizer/step": torch.tensor(3, dtype=torch.int64),
        "optimizer/large": torch.tensor([2**62 + 1, -1], dtype=torch.int64),
        "optimizer/bytes": torch.arange(9, dtype=torch.uint8),
        "optimizer/flags": torch.tensor([True, False]),
        "lonely": torch.ones(2, dtype=torch.int32),
    }


class Held:
    """An engine's side of a save: whole tensors on one rank."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values

    def specs(self) -> dict[str, Spec]:
        return {n: Spec(tuple(t.shape), t.dtype) for n, t in self.values.items()}

    def pieces(self) -> dict[str, Piece]:
        return {n: Piece(tuple(t.shape), 0, t.reshape(-1)) for n, t in self.values.items()}


def saving(directory: Path, **settings: object) -> Saving:
    return Saving(directory, Checkpoint(**settings), Mesh.one_rank())


def assert_same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        one, two = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other))
        assert torch.equal(one, two), name


@pytest.mark.parametrize("max_file_bytes", [1 << 30, 300])
def test_round_trip_is_bit_exact(tmp_path: Path, max_file_bytes: int) -> None:
    path = save(tmp_path, 12, tensors(), STATE, max_file_bytes=max_file_bytes)
    assert path == tmp_path / "step-00000012"
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.step, found.state, found.path) == (12, STATE, path)
    assert (found.rejected, found.lost_steps) == ((), 0)
    assert_same(found.tensors, tensors())
    files = {file.name for file in path.iterdir()}
    assert {"manifest.json", "state.json", "rank-00000-model-00001.safetensors"} <= files
    assert ("rank-00000-model-00002.safetensors" in files) == (max_file_bytes == 300)
    # A view is written as itself, not with the storage it lies in.
    assert sum(file.stat().st_size for file in path.iterdir()) < 12_000
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in path.iterdir())


def test_equal_content_gives_equal_files(tmp_path: Path) -> None:
    one = save(tmp_path / "a", 1, tensors(), STATE)
    two = save(tmp_path / "b", 1, dict(reversed(tensors().items())), STATE)
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_keeps_the_newest_and_never_the_wrong_one(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return sorted(int(path.name[5:]) for path in tmp_path.iterdir())

    for step in (1, 2, 3, 10, 100):
        save(tmp_path, step, tensors(), {}, keep=2)
    assert steps() == [10, 100]
    # A newer, broken one does not count: the one just saved is never deleted for it.
    save(tmp_path, 50, tensors(), {}, keep=1)
    assert steps() == [50, 100]
    save(tmp_path, 123_456_789, tensors(), {}, keep=1)
    assert steps() == [123_456_789]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 123_456_789


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, tensors(0), {"a": 1})
    save(tmp_path, 5, tensors(1), {"a": 2})
    found = load(tmp_path / "step-00000005")
    assert found.state == {"a": 2}
    assert_same(found.tensors, tensors(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Failure 11: the last good checkpoint stays as it is."""
    save(tmp_path, 1, tensors(), {})
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = tensors()
        bad["model/weight"][3, 4] = value
        with pytest.raises(NumericsError, match="model/weight") as caught:
            save(tmp_path, 2, bad, {})
        assert caught.value.exit_code == 6
        assert "1 of 561 elements" in caught.value.why
        with pytest.raises(NumericsError, match="model/weight"):
            saving(tmp_path).save(2, Held(bad), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be JSON"):
        save(tmp_path / "c", 1, {}, {"a": float("nan")})
    with pytest.raises(CheckpointError, match="must be JSON"):
        save(tmp_path / "c", 1, {}, {"a": {1, 2}})
    with pytest.raises(CheckpointError, match=r"torch\.complex64"):
        save(tmp_path / "c", 1, {"a": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(CheckpointError, match="keep >= 1"):
        save(tmp_path / "c", 1, {}, {}, keep=0)
    assert not (tmp_path / "c").exists()
    with pytest.raises(CheckpointError, match="cannot name a file"):
        save(tmp_path / "c", 1, {"../up/a": torch.zeros(1)}, {})
    assert list((tmp_path / "c").iterdir()) == []


def _limit_in_child(tmp_path: Path) -> tuple[int, str]:
    """Save under RLIMIT_FSIZE in a child process; its exit code and message."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            outcome = saving(tmp_path).save(2, Held(tensors()), {})
            assert outcome is not None
            os.write(write, outcome.text.encode())
            code = 2 if outcome.ok else 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_disk_that_refuses_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(), STATE)
    code, text = _limit_in_child(tmp_path)
    assert code == 0, text
    assert "File too large" in text
    assert "needed" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    found = load_latest(tmp_path)
    assert found is not None
    assert_same(found.tensors, tensors())


def test_a_full_disk_names_bytes_and_two_failures_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = saving(tmp_path, keep=2)

    def outcome(step: int) -> Outcome:
        found = saves.save(step, Held(tensors()), {})
        assert found is not None
        return found

    assert outcome(1).ok
    usage = os.statvfs(tmp_path)
    full = type("Usage", (), {"free": 4096, "total": usage.f_blocks, "used": 0})
    needed = sum(t.numel() * t.element_size() for t in tensors().values())
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: full)
        first = outcome(2)
        assert not first.ok
        assert f"needed {needed + 2} bytes, free 4096" in first.text
        with pytest.raises(CheckpointError, match="no checkpoint could be written") as caught:
            outcome(3)
        assert caught.value.exit_code == 4, "the second in a row"
    assert outcome(4).ok
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: full)
        assert not outcome(5).ok, "the count starts again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="no checkpoint could be written") as caught:
        save(tmp_path / "file" / "checkpoints", 1, tensors(), {})
    assert "Not a directory" in caught.value.why


def test_a_fresh_start_and_never(tmp_path: Path) -> None:
    for resume in ("auto", "strict", "never"):
        assert load_latest(tmp_path / "absent", resume=resume) is None
        assert load_latest(tmp_path, resume=resume) is None
    save(tmp_path, 3, tensors(), {})
    with pytest.raises(CheckpointError, match='resume is "never"'):
        load_latest(tmp_path, resume="never")


def _rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace a file and list it correctly: what someone who means harm would do."""
    (path / name).write_bytes(data)
    listed = {}
    for file in path.iterdir():
        if file.name != "manifest.json":
            content = file.read_bytes()
            listed[file.name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    (path / "manifest.json").write_bytes(render(int(path.name[5:]), listed))


def _safetensors(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _one(
    name: str = "a", dtype: str = "U8", shape: int = 1, begin: int = 0, body: bytes = b"1"
) -> bytes:
    entry = {"dtype": dtype, "shape": [shape], "data_offsets": [begin, begin + 1]}
    return _safetensors({name: entry}, body)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no safetensors header|announces"),
        (struct.pack("<Q", 1 << 60) + b"{}", "announces a header"),
        (_safetensors([1]), "no safetensors header"),
        (_one(dtype="F8_E4M3"), "F8"),
        (_one(shape=1 << 62), "fill"),
        (_one(shape=-1), "shape"),
        (_one(begin=1, body=b"12"), "gap"),
        (_one(body=b"12"), "describes"),
        (_one(name="model/weight@0"), "a second time"),
        (b"\x80\x04\x95\x00cposix\nsystem\n.", "announces"),
    ],
)
def test_forged_tensor_files_are_refused(tmp_path: Path, data: bytes, text: str) -> None:
    path = save(tmp_path, 1, tensors(), {})
    _rewrite(path, "zzz-00001.safetensors", data)
    with pytest.raises(CheckpointError, match=text):
        load(path)


def test_pickles_links_and_paths_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(), {})
    entry = FileEntry(1, "0" * 64)
    state = {"state.json": entry}
    for name in (
        "../x.json",
        "/etc/passwd",
        "a/b.json",
        "x.pt",
        "x.pkl",
        ".x.json",
        "manifest.json",
        "",
    ):
        with pytest.raises(CheckpointError, match="lists"):
            parse(render(1, state | {name: entry}), 1)
    with pytest.raises(CheckpointError, match=r"lists no state\.json"):
        parse(render(1, {}), 1)
    with pytest.raises(CheckpointError, match="without a size"):
        parse(render(1, {"state.json": FileEntry(-1, "0" * 64)}), 1)
    with pytest.raises(CheckpointError, match="another step"):
        parse(render(2, state), 1)

    victim = path / "rank-00000-model-00001.safetensors"
    outside = tmp_path / "outside"
    victim.rename(outside)
    victim.symlink_to(outside)
    with pytest.raises(
        CheckpointError, match=r"rank-00000-model-00001\.safetensors cannot be opened"
    ):
        load(path)
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(path)
    victim.unlink()
    outside.rename(victim)
    assert_same(load(path).tensors, tensors())
    (tmp_path / "step-00000002").symlink_to(path)
    with pytest.raises(CheckpointError, match="not a folder"):
        load(tmp_path / "step-00000002")


def test_more_than_the_model_can_need_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(), {})
    with pytest.raises(CheckpointError, match="at most 100 expected"):
        load(path, max_bytes=100)
    assert load(path, max_bytes=20_000).step == 1


def test_public_names_are_not_hidden_by_modules() -> None:
    for name in xdist.checkpoint.__all__:
        assert not isinstance(getattr(xdist.checkpoint, name), ModuleType), name
        importlib.import_module(getattr(getattr(xdist.checkpoint, name), "__module__", "xdist"))
        assert not isinstance(getattr(xdist.checkpoint, name), ModuleType), name
    for name in xdist.data.__all__:
        assert not isinstance(getattr(xdist.data, name), ModuleType), name
