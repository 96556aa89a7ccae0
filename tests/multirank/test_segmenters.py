"""Volume segmenters: every sharding equals one device; what is kept falls as 1/P."""

from __future__ import annotations

import pytest

from tests.multirank import segmenter_cases as cases
from xdist.testing import RankPool

CASES = [
    *[(name, dim) for name in ("raster", "axial") for dim in range(3)],
    ("rows", 2),
    ("none", 1),
]


def every_case() -> dict[str, list[str]]:
    return {f"{name}, dim {dim}": cases.against_one_device(name, dim) for name, dim in CASES}


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_segmenters_equal_one_device(ranks: int, request: pytest.FixtureRequest) -> None:
    """Logits, loss, the input's gradient and every parameter's, sharded first along each dim."""
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for found in pool.run(every_case):
        assert {case: wrong for case, wrong in found.items() if wrong} == {}


def test_segmenters_send_what_their_placement_counts(pool2: RankPool, pool3: RankPool) -> None:
    """Switches, halos and states, forward and backward, also of a stream in bfloat16."""
    for pool in (pool2, pool3):
        assert pool.run(cases.bytes_as_placed) == [[]] * pool.world_size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raster", "axial"])
def test_twenty_steps_on_four_ranks_are_those_of_one(name: str, pool4: RankPool) -> None:
    """Float64 loss curves to 1e-10, sharded first along another dim at each step."""
    wanted = cases.curve(name)
    assert wanted[-1] < wanted[0]
    for found in pool4.run(cases.curve, name):
        assert found == pytest.approx(wanted, rel=1e-10, abs=1e-10)


def table_of(sizes: tuple[int, ...]) -> dict[tuple[str, str], tuple[int, int]]:
    return {
        (name, stream): cases.kept_bytes(name, sizes, stream)
        for name in ("raster", "axial")
        for stream in ("same", "bfloat16")
    }


def test_kept_activations_fall_as_one_over_the_ranks(
    pool2: RankPool, pool3: RankPool, pool4: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a volume, within 10 % on 2, 3 and 4 ranks, what exchanges received included."""
    sizes = (48, 24, 24)
    whole, lines = table_of(sizes), {}
    for key, (alone, received) in whole.items():
        assert received == 0
        lines[key] = f"{key[0]}, {key[1]}: {alone:,}"
    for pool in (pool2, pool3, pool4):
        ranks = pool.world_size
        found = pool.run(table_of, sizes)
        for key, (alone, _) in whole.items():
            own = [one[key][0] for one in found]
            assert [n * ranks for n in own] == pytest.approx([alone] * ranks, rel=0.1), (key, own)
            lines[key] += f" | {min(own) / alone:.3f} to {max(own) / alone:.3f}"
    with capsys.disabled():
        print("\nmodel, stream: bytes kept on one rank | share of it on each of 2 | 3 | 4 ranks")
        print("\n".join(lines.values()))
