"""The plan without a process group: sums that must hold, and what it prints."""

from __future__ import annotations

import pytest
import torch

from xdist.config import Config, parse
from xdist.cost.moves import reduce_bytes
from xdist.models import build
from xdist.plan import pass_bytes, peak_memory, plan, rank_bytes, step_bytes
from xdist.plan.step import parameter_count

TEXT = """
[model]
dim = 32
head_dim = 16
pattern = "linear*2,attention*1"
window = 5
ngram_orders = [2, 3]
ngram_buckets = 64
[parallel]
data = {data}
ring = {ring}
ulysses = {ulysses}
layout = "{layout}"
[train]
curriculum = [{{length = 61, batch = 2, steps = 3}}, {{length = 1024, batch = 2, steps = 2}}]
accumulation = 2
"""


def _config(data: int = 1, ring: int = 1, ulysses: int = 1, layout: str = "contiguous") -> Config:
    return parse(TEXT.format(data=data, ring=ring, ulysses=ulysses, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("degrees", [(1, 1, 2), (1, 3, 1), (2, 2, 1), (2, 1, 1)])
def test_what_is_sent_is_received(degrees: tuple[int, int, int], layout: str) -> None:
    config = _config(*degrees, layout=layout)
    for stage in plan(config).stages:
        for move in {name for moves in stage.moves for name in moves}:
            traffic = [moves[move] for moves in stage.moves if move in moves]
            assert sum(t.sent_bytes for t in traffic) == sum(t.received_bytes for t in traffic)
        assert all(stage.sent_bytes)


def test_one_rank_sends_nothing() -> None:
    config = _config()
    assert all(step_bytes(config, stage) == [0] for stage in config.train.curriculum)
    assert "nothing crosses ranks" in plan(config).table()


def test_bytes_of_data_ranks_are_their_gradients_and_sums() -> None:
    config = _config(data=2)
    count = parameter_count(config)
    expected = reduce_bytes(count, 2, 0, 4).sent_bytes
    # Five numbers of the step, and the loss of each of the two micro-steps; float64.
    expected += reduce_bytes(5, 2, 0, 8).sent_bytes + 2 * reduce_bytes(1, 2, 0, 8).sent_bytes
    assert step_bytes(config, config.train.curriculum[0])[0] == expected


def test_documents_cut_states_off() -> None:
    config = _config(ring=2)
    stage = config.train.curriculum[0]
    joined = rank_bytes(config, stage, 0)
    inside = rank_bytes(config, stage, 0, [[0, 40, 61], None])
    border = rank_bytes(config, stage, 0, [[0, 31, 61], None])
    assert joined == step_bytes(config, stage)[0]
    assert border < inside <= joined


def test_scan_and_halo_do_not_grow_with_the_sequence() -> None:
    short, long = plan(_config(ring=2)).stages
    assert short.moves == long.moves


def test_bytes_of_a_certified_pass_do_not_depend_on_the_batch_split() -> None:
    config = _config(ring=3)
    single, double = (pass_bytes(config, 50, rows, precision="float32") for rows in (1, 2))
    wide = pass_bytes(config, 50, 1, precision="float64")
    assert all(one < two for one, two in zip(single, double, strict=True))
    assert all(one < two for one, two in zip(single, wide, strict=True))


def test_parameters_are_those_of_the_model() -> None:
    config = _config()
    assert parameter_count(config) == build(config.model).parameter_count()


def test_memory_grows_with_tokens_and_shrinks_with_ranks() -> None:
    alone, shared = _config(), _config(ring=2)
    short, long = (peak_memory(alone, stage)[0] for stage in alone.train.curriculum)
    assert short < long
    kept = [plan(config).stages[1].memory[0].kept for config in (alone, shared)]
    assert kept[1] < kept[0]


def test_the_table_holds_every_move_and_part() -> None:
    table = plan(_config(ring=2)).table()
    for word in ("halo", "scan", "reduce", "gradients", "optimizer", "kept", "1,024"):
        assert word in table, table


def test_no_process_group_is_made() -> None:
    plan(_config(ring=2))
    assert not torch.distributed.is_initialized()
