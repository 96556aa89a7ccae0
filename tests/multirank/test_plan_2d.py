"""The plan knows both factors of the mesh: bytes by move are the ledger's where attention is 2d."""

from __future__ import annotations

import pytest
import torch

import xdist
from xdist.config import Config, parse
from xdist.models import build
from xdist.plan.model import pass_moves, sizes
from xdist.testing import RankPool

# Where FLOPs outweigh bytes: with two heads ulysses would leave two of the ranks idle.
TOKENS = 512
TEXT = """
[model]
kind = "mixer_lm"
vocab_size = 11
dim = 8
head_dim = 4
pattern = "attention*2"
window = "none"
[parallel]
ring = {ring}
ulysses = {ulysses}
layout = "zigzag"
attention = "{strategy}"
"""


def config_of(ring: int, ulysses: int, strategy: str) -> Config:
    return parse(TEXT.format(ring=ring, ulysses=ulysses, strategy=strategy))


def moved_by(ring: int, ulysses: int, strategy: str) -> dict[str, tuple[int, int]]:
    """Bytes sent and received by this rank in one pass, by move of attention."""
    config = config_of(ring, ulysses, strategy)
    mesh = xdist.init_mesh(ring=ring, ulysses=ulysses)
    shard = xdist.SequenceShard(mesh, xdist.Layout.zigzag(TOKENS, mesh.sequence_size))
    model = build(config.model, seed=0, parallel=config.parallel)
    tokens = torch.randint(11, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with xdist.comm.ledger() as moved:
        model(shard.scatter(tokens), shard).square().sum().backward()
    found = {name: moved.by_move[name] for name in ("switch", "ring") if name in moved.by_move}
    return {name: (one.sent_bytes, one.received_bytes) for name, one in found.items()}


@pytest.mark.parametrize("strategy", ["auto", "2d"])
def test_bytes_of_both_factors_equal_the_ledger(strategy: str, pool4: RankPool) -> None:
    """Two heads on four ranks: auto takes 2d of its own accord."""
    config = config_of(2, 2, strategy)
    layout = xdist.Layout.zigzag(TOKENS, 4)
    for rank, moved in enumerate(pool4.run(moved_by, 2, 2, strategy)):
        planned = pass_moves(sizes(config), layout, (0, TOKENS), rank, 1, ulysses=2)
        wanted = {name: tuple(one) for name, one in planned.items() if any(one)}
        assert moved == wanted
        assert set(moved) == {"switch", "ring"}
