"""What the benchmark beside other projects measures, on few tokens: tests/benchmarks/peers.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from xdist.testing import RankPool

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import peers
from peers_measure import alone
from peers_methods import METHODS, Sizes

DENSE = Sizes(512, 4, 2, dim=16)
PACKED = Sizes(512, 4, 2, dim=16, documents=4)
BESIDE = (
    "xdist ulysses",
    "xdist ring",
    "DeepSpeed DistributedAttention",
    "DeepSpeed UlyssesSPAttentionHF",
    "ringmaster Ulysses",
    "ringmaster Ulysses by all-to-all",
    "ringmaster ring, p2p",
)


def measured(sizes: Sizes) -> dict[str, dict[str, object]]:
    """Every method of BESIDE on this rank."""
    return {name: alone(name, sizes, sizes) for name in BESIDE}


def by_method(pool: RankPool, sizes: Sizes) -> dict[str, tuple[float, int]]:
    """Error and most bytes of a rank by method."""
    ranks = pool.run(measured, sizes)
    want = peers.reference(sizes)
    found = {}
    for name in BESIDE:
        own = [rank[name] for rank in ranks]
        assert not any("refused" in rank for rank in own), own
        found[name] = peers.error(own, want), max(rank["moved_bytes"] for rank in own)
    return found


@pytest.mark.slow
def test_peers_give_the_same_attention_for_no_fewer_bytes() -> None:
    with RankPool(2) as pool:
        dense, packed = by_method(pool, DENSE), by_method(pool, PACKED)
    for name in BESIDE:
        assert dense[name][0] < 1e-5, name
        like = METHODS[name].like or name
        assert dense[like][1] <= dense[name][1], name
        assert packed[like][1] <= packed[name][1], name
    # The table must say so of whom documents leak: its layers take torch's kernel as it is.
    assert packed["DeepSpeed UlyssesSPAttentionHF"][0] > peers.WRONG
    for name in set(BESIDE) - {"DeepSpeed UlyssesSPAttentionHF"}:
        assert packed[name][0] < 1e-5, name


def test_the_interval_of_a_median_is_that_of_order_statistics() -> None:
    # Six: 1 - 2 / 2^6 = 0.969 between the ends. Nine: 1 - 2 * (1 + 9) / 2^9 = 0.961 one inside.
    assert peers.interval([3.0, 1, 2, 6, 5, 4]) == (1, 6)
    assert peers.interval(list(range(9))) == (1, 7)
    assert all(map(math.isnan, peers.interval([1.0] * 5)))


def test_the_cells_are_those_of_the_goal() -> None:
    cells = peers.cells()
    assert {(s.tokens, s.documents) for s, _ in cells.values()} == {
        (8192, 1), (32768, 1), (131072, 16)
    }  # fmt: skip
    for ranks in (2, 4):
        kinds = {s.heads == s.groups for s, r in cells.values() if r == ranks}
        assert kinds == {True, False}


def test_memory_is_measured_again_without_times() -> None:
    row = {"peer": "p", "beside": "x", "ratio": 0.9, "missed": "time, memory", "commit": "a"}
    row |= {f"{who} {what} (MiB)": 2.0 for who in ("xdist", "peer") for what in ("moved", "peak")}
    own = {"x": {"moved": 1.0, "peak": 3.0}, "p": {"moved": 0.5, "peak": 4.0}}
    found = peers.with_memory(row, own)
    assert found == row | {
        "missed": "time, bytes", "xdist moved (MiB)": 1.0, "peer moved (MiB)": 0.5,
        "xdist peak (MiB)": 3.0, "peer peak (MiB)": 4.0,
    }  # fmt: skip
    # Of a peer that refuses nothing is known, and nothing missed.
    refusing = row | {"missed": "", "peer moved (MiB)": "", "peer peak (MiB)": ""}
    found = peers.with_memory(refusing, {"x": own["x"]})
    assert found == refusing | {"xdist moved (MiB)": 1.0, "xdist peak (MiB)": 3.0}
