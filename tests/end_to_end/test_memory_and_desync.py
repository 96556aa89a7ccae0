"""Failures 14 and 15: out of memory ends with 9 and a breakdown; ranks that differ end with 8."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.end_to_end.forked import Case, Ended
from tests.end_to_end.training import config_of, losses, make_store, status_of
from xdist.checkpoint import load_latest
from xdist.config import Config
from xdist.errors import DesyncError, XdistError
from xdist.mesh import Mesh, init_mesh
from xdist.testing import RankPool
from xdist.train import run
from xdist.train.desync import check_equal, hash_of
from xdist.train.out_of_memory import is_out_of_memory, out_of_memory

HOST = os.uname().nodename
# The second step is of sequences 64 times as long, in one tile.
LARGE = [
    "train.curriculum=[{length=64,batch=2,steps=1},{length=4096,batch=2,steps=2}]",
    "train.tile_tokens=4096",
    "model.dim=256",
    "model.head_dim=32",
    "checkpoint.every_steps=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("memory")
    make_store(made)
    return made


@pytest.fixture(scope="module")
def ended(folder: pathlib.Path, drive: Callable[..., dict[str, Ended]]) -> dict[str, Ended]:
    cases = [
        Case("one", LARGE, 1, 0, "little_memory 16", "train.recorded", 1),
        Case("two", LARGE, 2, 1, "little_memory 16", "train.recorded", 1),
    ]
    return drive(folder, cases, at_once=2)


def _bytes(words: str) -> float:
    number, unit = words.split()
    return float(number) * {"GiB": 2**30, "MiB": 2**20}[unit]


def test_out_of_memory_ends_with_9_and_says_what_to_change(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    """The system really refuses memory (RLIMIT_AS); the plan's parts stand beside what is held."""
    one = ended["one"]
    assert one.codes == [9]
    what, why, do = one.said[0].strip().splitlines()[-3:]
    assert re.fullmatch(rf"{HOST}: out of memory in (forward|backward) of step 2", what)
    assert "can't allocate memory" in why or "could not create a primitive" in why
    assert re.search(r"held: parameters [\d.]+ MiB, .*optimizer state [\d.]+ MiB, peak res", why)
    assert re.search(r"planned peak [\d.]+ [GM]iB: process .*, parameters .*, optimizer .*", why)
    tried = re.findall(r"(\S+=\S+(?: \S+=\S+)*) \(planned ([\d.]+ [GM]iB)\)", do)
    assert [words.split("=")[0] for words, _ in tried][:2] == [
        "parallel.ulysses",
        "train.tile_tokens",
    ]
    planned = re.search(r"planned peak ([\d.]+ [GM]iB)", why)
    assert planned is not None
    assert all(_bytes(peak) < _bytes(planned.group(1)) for _, peak in tried)
    status = status_of(config_of(folder, "one"))
    assert (status["state"], status["exit_code"]) == ("failed", 9)
    assert status["last_checkpoint"].endswith("step-00000001")
    # What it says to try works.
    assert run(config_of(folder, "one", *LARGE[:1], *LARGE[2:], "train.tile_tokens=1024")) == 0
    assert len(losses(config_of(folder, "one"))) == 3


def test_out_of_memory_on_one_rank_is_told_by_that_rank(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    two = ended["two"]
    assert two.codes[1] == 9
    assert two.codes[0] in (7, -6)
    assert "out of memory in " in two.said[1]
    status = status_of(config_of(folder, "two"))
    assert (status["exit_code"], status["rank"]) == (9, 1)


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    error = out_of_memory(caught.value, Config(), None, "forward", 0, planned=False)
    assert error.exit_code == 9
    assert "use more ranks a sequence" in error.do


def test_any_changed_bit_and_any_swap_change_the_hash() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        x = (4 * torch.randn(3, 1001)).relu().to(dtype)
        before = int(hash_of(x))
        words = x.view(-1).view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        )
        for place in (0, 17, words.numel() - 1):
            words[place] ^= 1
            assert int(hash_of(x)) != before
            words[place] ^= 1
        assert int(hash_of(x)) == before
        unlike = int((words != words[5]).nonzero()[0, 0])
        words[[5, unlike]] = words[[unlike, 5]].clone()
        assert int(hash_of(x)) != before
    # Longer than one block: the block counts too.
    long = torch.zeros(2**18 + 7)
    swapped = long.clone()
    long[3], swapped[2**18 + 3] = 1.0, 1.0
    assert int(hash_of(long)) != int(hash_of(swapped))
    assert int(hash_of(torch.zeros(5))) != int(hash_of(torch.zeros(6)))
    assert int(hash_of(torch.zeros(0))) == 0


def _perturbed(folder: str, name: str, ranks: list[int], *settings: str) -> tuple[int, str, int]:
    """Train; after the update of step 3 some ranks' weight is one unit in the last place off."""
    config = config_of(pathlib.Path(folder), name, *settings)
    rank = int(os.environ["RANK"])
    kept: list[nn.Module] = []
    updates = 0

    def build(config: Config) -> nn.Module:
        from xdist.train.setup import build_model

        kept.append(build_model(config))
        return kept[0]

    def on_point(point: str) -> None:
        nonlocal updates
        updates += point == "train.updated"
        if point == "train.updated" and updates == 3 and rank in ranks:
            weight = dict(kept[0].named_parameters())[_last(kept[0])]
            first = weight.data.view(-1)[:1]
            first.copy_(torch.nextafter(first, first + 1))

    try:
        return run(config, build=build, on_point=on_point), "", updates
    except XdistError as error:
        return error.exit_code, str(error), updates


def _last(module: nn.Module) -> str:
    return sorted(name for name, _ in module.named_parameters())[-1]


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        # By the regular check; by the one before a save, which then is not made.
        pytest.param(
            ("train.check_every_steps=4", "checkpoint.every_steps=1000"),
            4,
            id="regular",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("train.check_every_steps=0", "checkpoint.every_steps=2"), 4, id="before-a-save"
        ),
        pytest.param(
            ("train.check_every_steps=1", "checkpoint.every_steps=2"),
            3,
            id="every-step",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_bit_on_one_rank_ends_all_with_8_and_no_bad_checkpoint(
    folder: pathlib.Path, pool3: RankPool, settings: tuple[str, ...], step: int
) -> None:
    name = f"desync-{step}-{settings[0][-1]}"
    more = ("parallel.data=1", "parallel.ulysses=3", *settings)
    ended = pool3.run(_perturbed, str(folder), name, [1], *more)
    code, message, updates = ended[0]
    assert [one[:2] for one in ended] == [(8, message)] * 3
    assert (code, updates) == (8, step)
    what, why, do = message.splitlines()
    assert f"rank 1 on {HOST} differs from the others" in what
    assert f"after step {step}" in what
    # Its state of the optimizer differs too from the next step on; names are in sorted order.
    assert re.search(r"first in (model|optimizer)/\S+$", what)
    assert "tensors differ, by 64-bit hashes over 3 ranks" in why
    assert "no checkpoint is made of it" in do
    config = config_of(folder, name)
    status = status_of(config)
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 8, 1)
    loaded = load_latest(config.run_directory / "checkpoints")
    assert (loaded.step if loaded else 0) == (0 if "1000" in settings[1] else 2)


@pytest.mark.slow
def test_data_ranks_are_compared_too(folder: pathlib.Path, pool2: RankPool) -> None:
    settings = ("parallel.data=2", "train.check_every_steps=1", "checkpoint.every_steps=1000")
    ended = pool2.run(_perturbed, str(folder), "desync-data", [1], *settings)
    assert [one[0] for one in ended] == [8, 8]
    assert "differs from rank 0" in ended[0][1]


def _names_and_bytes() -> tuple[str, int, int]:
    from xdist.comm import ledger

    mesh: Mesh = init_mesh(device="cpu", ulysses=2)
    tensors = {"a": torch.arange(7.0), "b": torch.ones(3), "c": torch.zeros(2, 2)}
    with ledger() as moved:
        check_equal(tensors.items(), mesh, when="now")
    if mesh.world_rank == 1:
        tensors["b"][2] = torch.nextafter(tensors["b"][2], torch.tensor(2.0))
        tensors["c"][0, 0] = -0.0
    try:
        check_equal(tensors.items(), mesh, when="now")
    except DesyncError as error:
        return error.what, moved.sent_bytes, moved.control_bytes
    return "", 0, 0


def test_the_first_tensor_is_named_and_a_check_costs_8_bytes_a_peer(pool2: RankPool) -> None:
    """Also a zero whose sign differs: bits are compared, not values."""
    for what, sent, control in pool2.run(_names_and_bytes):
        assert what.endswith("differs from rank 0, first in b")
        assert (sent, control) == (0, 8)
