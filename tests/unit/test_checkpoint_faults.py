"""Whatever happens to a checkpoint, in a save or afterwards, the last good one is used, loudly."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from xdist.checkpoint.folders import clean_stale
from xdist.checkpoint.points import SAVE_POINTS, Cut, ignore
from xdist.checkpoint.read import load_latest
from xdist.checkpoint.write import save
from xdist.errors import CheckpointError


def _tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "model/w": torch.full((200,), float(step)),
        "optimizer/m": torch.full((50,), -1.0 * step),
    }


def _save(directory: Path, step: int, **options: object) -> Path:
    return save(directory, step, _tensors(step), {"cursor": 8 * step}, keep=2, **options)


def _assert_is(directory: Path, step: int) -> None:
    found = load_latest(directory)
    assert found is not None
    assert found.step == step
    assert found.state == {"cursor": 8 * step}
    for name, tensor in _tensors(step).items():
        assert torch.equal(found.tensors[name], tensor)


class _Stop(BaseException):
    pass


def _raise(name: str) -> None:
    raise _Stop(name)


def test_a_save_passes_every_point_in_order(tmp_path: Path) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    passed: list[str] = []
    _save(tmp_path, 2, on_point=passed.append)
    passed.append("--")
    _save(tmp_path, 3, on_point=passed.append)
    assert set(passed) == {*SAVE_POINTS, "--"}
    assert len(SAVE_POINTS) >= 8
    for part in (passed[: passed.index("--")], passed[passed.index("--") + 1 :]):
        places = [SAVE_POINTS.index(name) for name in part]
        assert places == sorted(places)


# The tensors' point is passed once per file.
_CUTS = [(name, 1) for name in SAVE_POINTS] + [("save.tensors_written", 2)]


def _good_step(name: str, replacing: bool) -> int:
    """The step that must be there after a cut at `name`: the old one until the rename."""
    before = 2
    after = 2 if replacing else 3
    return after if SAVE_POINTS.index(name) >= SAVE_POINTS.index("save.renamed") else before


@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_cut_at_any_point_leaves_the_last_good_checkpoint(
    tmp_path: Path, how: str, replacing: bool
) -> None:
    """Every named point, by an exception and by SIGKILL of the whole process."""
    for name, occurrence in _CUTS:
        # Replacing a step has nothing to prune, saving a new one nothing to move.
        if name.startswith("save.prune") if replacing else name == "save.old_moved":
            continue
        directory = tmp_path / f"{name}-{occurrence}"
        _save(directory, 1)
        _save(directory, 2)
        step = 2 if replacing else 3
        if how == "raise":
            with pytest.raises(_Stop):
                _save(directory, step, on_point=Cut(name, occurrence, _raise))
        else:
            child = os.fork()
            if child == 0:
                try:
                    _save(directory, step, on_point=Cut(name, occurrence))
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        lines = clean_stale(directory)
        assert all(path.name.startswith("step-") for path in directory.iterdir())
        _assert_is(directory, _good_step(name, replacing))
        assert clean_stale(directory) == []
        if how == "kill" and name == "save.manifest_written":
            assert "left by an interrupted save" in lines[0]
        # The run goes on from there, and nothing is in its way.
        _save(directory, 3)
        _assert_is(directory, 3)


def test_cut_strikes_once_at_the_given_occurrence() -> None:
    struck: list[str] = []
    cut = Cut("b", 2, struck.append)
    for name in "abcbbab":
        cut(name)
    assert struck == ["b"]
    ignore("anything")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    "name", ["rank-00000-model-00001.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", [_truncate, _grow, Path.unlink])
def test_damage_falls_back_and_says_so(tmp_path: Path, name: str, damage) -> None:
    _save(tmp_path, 100)
    path = _save(tmp_path, 120)
    damage(path / name)
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.step, found.lost_steps) == (100, 20)
    (line,) = found.rejected
    assert line.startswith(f"step-00000120 rejected: {name}")
    assert found.lines()[1] == "using step-00000100: 20 steps are lost and will be repeated"


def test_a_flipped_bit_names_file_and_both_hashes(tmp_path: Path) -> None:
    """Failure 7: "want .., got ..", the older one used; strict stops; none whole stops."""
    _save(tmp_path, 1100)
    path = _save(tmp_path, 1200) / "rank-00000-model-00001.safetensors"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [0, 7, 8, len(good) - 1, *rng.integers(0, len(good), 30).tolist()]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        want, got = (hashlib.sha256(data).hexdigest()[:16] for data in (good, bytes(bad)))
        found = load_latest(tmp_path)
        assert found is not None
        assert found.rejected == (
            f"step-00001200 rejected: {path.name} sha256 mismatch (want {want}.., got {got}..)",
        )
        assert (found.step, found.lost_steps) == (1100, 100)
    with pytest.raises(CheckpointError, match=r"(?s)step-00001200 rejected: .*strict") as caught:
        load_latest(tmp_path, resume="strict")
    assert caught.value.exit_code == 4
    shutil.copy(path, tmp_path / "step-00001100" / path.name)
    with pytest.raises(CheckpointError, match="none of them is whole") as caught:
        load_latest(tmp_path)
    assert caught.value.exit_code == 4
    assert "step-00001200 rejected" in caught.value.why
    assert "step-00001100 rejected" in caught.value.why


def test_every_byte_of_a_manifest_is_sealed(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2) / "manifest.json"
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        found = load_latest(tmp_path)
        assert found is not None
        # Only a space turned into another character of white space means the same JSON.
        assert found.step == 1 or chr(good[place]).isspace(), place


def test_swapped_files_and_foreign_folders(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    model, optimizer = (
        path / "rank-00000-model-00001.safetensors",
        path / "rank-00000-optimizer-00001.safetensors",
    )
    a, b = model.read_bytes(), optimizer.read_bytes()
    model.write_bytes(b)
    optimizer.write_bytes(a)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 1
    model.write_bytes(a)
    optimizer.write_bytes(b)
    # Left-over files that the manifest does not list are not read.
    (path / "rank-00000-model-00002.safetensors").write_bytes(a)
    (path / "old.pt").write_bytes(b"pickle")
    _assert_is(tmp_path, 2)
    # A folder renamed to another step, other names, a file: no checkpoints.
    shutil.copytree(path, tmp_path / "step-00000009")
    shutil.copytree(path, tmp_path / "step-9")
    (tmp_path / "step-00000007").write_text("")
    (tmp_path / "latest").write_text("step-00000099")
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 2
    assert "another step" in found.rejected[0]
    assert len(found.rejected) == 2


def test_order_is_by_step_not_by_time_or_text(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        _save(tmp_path, step)
    os.utime(tmp_path / "step-100000000", (0, 0))
    _assert_is(tmp_path, 100_000_000)
