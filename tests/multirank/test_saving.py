"""Real ranks write one checkpoint together, in the step or in the background; a rank that cannot
makes the save fail on all of them."""

from __future__ import annotations

import pathlib
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xdist.checkpoint import Cut, load_latest
from xdist.checkpoint.pieces import Piece, Spec
from xdist.checkpoint.points import ignore
from xdist.config import Checkpoint
from xdist.errors import CheckpointError, XdistError
from xdist.mesh import Mesh, init_mesh
from xdist.testing import RankPool
from xdist.train.agree import share_tensor
from xdist.train.metrics import PeakMemory
from xdist.train.saving import Outcome, Saving

ROWS = 12
PATIENCE_S = 60.0


class Shared:
    """An engine that holds an even share of the rows of two tensors on each rank."""

    def __init__(self, mesh: Mesh, step: int) -> None:
        self.whole = {
            "model/w": torch.arange(ROWS * 5.0).reshape(ROWS, 5) + step,
            "optimizer/exp_avg/w": -torch.arange(ROWS * 5.0).reshape(ROWS, 5) * step,
        }
        self.own = {}
        for name, tensor in self.whole.items():
            first = ROWS * mesh.world_rank // mesh.world_size
            last = ROWS * (mesh.world_rank + 1) // mesh.world_size
            self.own[name] = (5 * first, tensor[first:last].reshape(-1).clone())

    def specs(self) -> dict[str, Spec]:
        return {n: Spec(tuple(t.shape), t.dtype) for n, t in self.whole.items()}

    def pieces(self) -> dict[str, Piece]:
        return {n: Piece((ROWS, 5), start, values) for n, (start, values) in self.own.items()}


def _assert_is(directory: str, step: int) -> None:
    found = load_latest(directory)
    assert found is not None
    assert (found.step, found.state) == (step, {"step": step})
    wanted = Shared(Mesh.one_rank(), step).whole
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found.tensors[name], tensor)


def _saving(directory: str, mesh: Mesh, on_point: Callable[[str], None], **more: bool) -> Saving:
    return Saving(directory, Checkpoint(**more), mesh, on_point)


def _boundaries(saving: Saving) -> Outcome:
    """Step boundaries until a save in flight has come to its end, as the loop makes them."""
    mesh = saving._mesh
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        waiting = torch.tensor([float(saving.waiting)])
        from xdist.comm.reduce import start_reduce

        if start_reduce(waiting, mesh.parameter_group).wait() == mesh.world_size:
            outcome = saving.advance()
            if outcome is not None:
                return outcome
    raise AssertionError("the save did not end")


def _together(directory: str, asynchronous: bool) -> list[str]:
    """Two good saves; the files of the second."""
    mesh = init_mesh()
    points: list[str] = []
    saving = _saving(directory, mesh, points.append, asynchronous=asynchronous)
    for step in (1, 2):
        engine = Shared(mesh, step)
        outcome = saving.save(step, engine, {"step": step})
        if asynchronous:
            assert outcome is None
            assert saving.in_flight == step
            for _, values in engine.own.values():
                values.fill_(-7.0)  # the next update: what is written are the copies
            outcome = _boundaries(saving) if step == 1 else saving.finish()
        assert outcome is not None
        assert outcome.ok
        assert outcome.step == step
        assert outcome.path is not None
        assert saving.in_flight is None
    assert ("save.renamed" in points) == (mesh.world_rank == 0)
    assert "save.tensors_written" in points
    return sorted(file.name for file in outcome.path.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_ranks_write_one_checkpoint(
    tmp_path: pathlib.Path, pool3: RankPool, asynchronous: bool
) -> None:
    files = pool3.run(_together, str(tmp_path), asynchronous)
    groups = ("model", "optimizer")
    names = [f"rank-{r:05}-{group}-00001.safetensors" for r in range(3) for group in groups]
    assert files == [sorted(["manifest.json", "state.json", *names])] * 3
    _assert_is(str(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def _remove_own_files(directory: str) -> Callable[[str], None]:
    """The disk forgets what one rank wrote: really, by removing its files before their flush."""

    def remove(name: str) -> None:
        for file in pathlib.Path(directory).glob(".tmp-*/rank-00001-*"):
            file.unlink()

    return remove


def _failing(directory: str, asynchronous: bool, bad: str) -> list[str]:
    """A good save, then two that fail on one rank only; what every rank hears."""
    mesh = init_mesh()
    good = _saving(directory, mesh, ignore, asynchronous=asynchronous)
    good.save(1, Shared(mesh, 1), {"step": 1})
    good.finish()
    said = []
    here = bad == "disk" and mesh.world_rank == 1
    action = _remove_own_files(directory) if here else ignore
    # Rank 1's first file of each of the saves 2 and 3.
    cuts = [Cut("save.tensors_written", count, action) for count in (1, 2)]
    saving = _saving(
        directory, mesh, lambda name: [cut(name) for cut in cuts], asynchronous=asynchronous
    )
    for step in (2, 3):
        engine = Shared(mesh, step)
        if bad == "nan" and mesh.world_rank == 1:
            engine.own["model/w"][1][0] = torch.nan
        try:
            outcome = saving.save(step, engine, {"step": step})
            if asynchronous and outcome is None:
                outcome = _boundaries(saving)
            assert outcome is not None
            assert not outcome.ok
            assert saving.in_flight is None
            said.append(outcome.text)
        except XdistError as error:
            said.append(f"{type(error).__name__} {error.exit_code}: {error}")
            break
    return said


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_that_cannot_write_fails_the_save_on_all(
    tmp_path: pathlib.Path, pool2: RankPool, asynchronous: bool
) -> None:
    """The first failure is a warning, the second ends the run, on every rank alike."""
    said = pool2.run(_failing, str(tmp_path), asynchronous, "disk")
    assert said[0] == said[1]
    first, second = said[0]
    assert first.startswith("step 2 was not saved: rank 1 on ")
    assert "no checkpoint could be written" in first
    assert "needed" in first
    assert second.startswith("CheckpointError 4: rank 1 on ")
    _assert_is(str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_value_that_is_not_finite_on_one_rank_is_refused_by_all(
    tmp_path: pathlib.Path, pool2: RankPool, asynchronous: bool
) -> None:
    said = pool2.run(_failing, str(tmp_path), asynchronous, "nan")
    assert said[0] == said[1]
    (only,) = said[0]
    assert only.startswith("NumericsError 6: rank 1 on ")
    assert "model/w" in only
    _assert_is(str(tmp_path), 1)


def _slow(directory: str) -> list[bool]:
    """While rank 1's thread is kept from writing: steps go on, nothing is published."""
    mesh = init_mesh()
    held = threading.Event()

    def on_point(name: str) -> None:
        if name == "save.tensors_written" and mesh.world_rank == 1:
            assert threading.current_thread() is not threading.main_thread()
            assert held.wait(PATIENCE_S)

    saving = _saving(directory, mesh, on_point, asynchronous=True)
    saving.save(4, Shared(mesh, 4), {"step": 4})
    seen = []
    for _ in range(20):
        row = share_tensor(torch.tensor([1.0]), (1,), torch.float32, mesh)  # a step's exchange
        assert row == 1
        seen.append(saving.waiting)
        assert load_latest(directory) is None
    held.set()
    assert _boundaries(saving).ok
    return seen


def test_steps_go_on_while_a_slow_disk_is_written_to(
    tmp_path: pathlib.Path, pool2: RankPool
) -> None:
    """Nobody waits for the slow rank, and no half of a checkpoint gets its name."""
    _, slow = pool2.run(_slow, str(tmp_path))
    assert not any(slow)
    _assert_is(str(tmp_path), 4)


TENSORS, TENSOR_BYTES = 8, 32 << 20


def _load_streaming(directory: str) -> int:
    """Load 256 MiB into an engine's own tensors; by how much the peak exceeded them, bytes."""
    from xdist.checkpoint import open_latest
    from xdist.train.resume import _reader

    mesh = init_mesh()
    own: dict[str, Tensor] = {f"model/{i}": torch.zeros(TENSOR_BYTES // 4) for i in range(TENSORS)}
    for tensor in own.values():
        tensor.fill_(-1.0)
    specs = {n: Spec(tuple(t.shape), t.dtype) for n, t in own.items()}
    share_tensor(torch.zeros(TENSOR_BYTES // 4), (TENSOR_BYTES // 4,), torch.float32, mesh)
    memory = PeakMemory(mesh.device)
    assert memory.exact
    memory.start()
    before = memory.peak_bytes()
    found = open_latest(directory) if mesh.world_rank == 0 else None
    read = _reader(found, specs, mesh)
    for name in sorted(own):
        own[name].copy_(read(name))
    for index, name in enumerate(sorted(own)):
        assert own[name][0] == own[name][-1] == float(index)
    return memory.peak_bytes() - before


def test_loading_holds_one_whole_tensor_beside_the_engines_own(
    tmp_path: pathlib.Path, pool2: RankPool
) -> None:
    """8 tensors of 32 MiB on 2 ranks: each rank holds its own 256 MiB, one tensor and a block."""
    from xdist.checkpoint import save

    tensors = {f"model/{i}": torch.full((TENSOR_BYTES // 4,), float(i)) for i in range(TENSORS)}
    save(tmp_path, 1, tensors, {})
    beyond = pool2.run(_load_streaming, str(tmp_path))
    assert max(beyond) < 2.5 * TENSOR_BYTES, beyond


def _read_failure(directory: str) -> str:
    from xdist.checkpoint import open_latest
    from xdist.train.resume import _reader

    mesh = init_mesh()
    found = None
    if mesh.world_rank == 0:
        found = open_latest(directory)
        next(pathlib.Path(directory).glob("*/rank-00000-model-*")).unlink()
    try:
        _reader(found, {"model/0": Spec((5,), torch.float32)}, mesh)("model/0")
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_file_that_vanishes_while_loading_fails_every_rank(
    tmp_path: pathlib.Path, pool2: RankPool
) -> None:
    from xdist.checkpoint import save

    save(tmp_path, 1, {"model/0": torch.zeros(5)}, {})
    said = pool2.run(_read_failure, str(tmp_path))
    assert said[0] == said[1]
    assert "rank-00000-model-00001.safetensors is missing" in said[0]
