"""What a process group carries decides where moves read and write, whatever it was called."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.distributed as dist

import xdist
from tests.end_to_end.training import config_of, losses, make_store, run_here
from xdist.testing import count_c10d_bytes, run_ranks

ENGINES = ("plain", "fsdp")


def _train_by_card(folder: str) -> list[tuple[int, str]]:
    from tests.multirank.pretended_card import CARD_ONLY

    dist.init_process_group(CARD_ONLY)
    with count_c10d_bytes() as counted:
        found = [
            run_here(folder, f"card-{name}", "parallel.ring=2", f"engine.name={name}")
            for name in ENGINES
        ]
    assert {"send", "recv_", "_allgather_base_", "_reduce_scatter_base_"} <= counted.ops.keys()
    return found


def test_a_group_that_carries_no_host_memory_is_never_given_any(tmp_path: pathlib.Path) -> None:
    """As with NCCL, under which the control bytes of a run begin on the host."""
    make_store(tmp_path)
    assert run_here(str(tmp_path), "one") == (0, "")
    one = losses(config_of(tmp_path, "one"))
    assert run_ranks(_train_by_card, 2, str(tmp_path)) == [[(0, "")] * len(ENGINES)] * 2
    for name in ENGINES:
        assert losses(config_of(tmp_path, f"card-{name}")) == pytest.approx(one, rel=1e-6)


def _unnamed() -> list[tuple[str, list[int]]]:
    """Shards on worlds of which torch does not say "gloo"."""
    found = []
    dist.init_process_group()
    for group in (dist.group.WORLD, dist.new_group(backend="cpu:gloo")):
        mesh = xdist.Mesh(1, 1, 2, dist.get_rank(), torch.device("cpu"), sequence_group=group)
        shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(8, 2))
        found.append((str(dist.get_backend(group)), [shard.rank, shard.size]))
    return found


def test_a_group_of_the_users_need_not_be_called_gloo() -> None:
    for rank, found in enumerate(run_ranks(_unnamed, 2)):
        assert found == [("undefined", [rank, 2]), ("cpu:gloo", [rank, 2])]
