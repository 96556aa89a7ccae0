"""Law 1 of what grids are made of on eight ranks: more ranks than most dims have positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.multirank import grid_attention_cases as attention
from tests.multirank import grid_scan_cases as scans
from tests.multirank import test_conv_nd as convolutions
from tests.multirank import test_grid_attention as problems
from tests.multirank import test_grid_shard as shards
from tests.multirank import test_patches as patched
from xdist.testing import RankPool, relative_error

SWITCHED = (9, 4, 3)
CONVOLVED = [convolutions.CASES[number] for number in (0, 1, 4, 6, 7)]
ATTENDED = [
    attention.Case(problem, dim)
    for problem in (*problems.NEAR[:3], problems.BLOCKS[0], problems.STRIDED[0])
    for dim in range(len(problem.sizes))
]
SCANNED = [
    scans.Case("selective_scan", (9, 3, 2), 0, (0, 1, 2), "both"),
    scans.Case("linear_attention", (3, 9, 2), 1, (2, 0, 1), "both", True),
    scans.Case("ssd", (3, 4, 5), 2, (0, 2), True),
    scans.Case("delta_rule", (9, 2), 0, (0,)),
    scans.Case("own", (4, 9), 0, (1,), "both"),
]


class Found(NamedTuple):
    """What one rank found: what went wrong, and its parts of outputs and gradients."""

    switched: list[str]
    patched: list[str]
    convolved: list[list[dict[str, Tensor]]]
    attended: list[tuple[dict[str, Tensor], str]]
    scanned: list[dict[str, Any]]


def everything() -> Found:
    """On one rank; each also holds its bytes against formulas and a second count."""
    return Found(
        shards.moved_and_back(SWITCHED),
        patched.run_cases(0.5),
        convolutions.run_cases(CONVOLVED),
        attention.run_cases(ATTENDED),
        scans.on_a_rank(SCANNED),
    )


@pytest.mark.slow
def test_eight_ranks_equal_one_device(pool8: RankPool) -> None:
    """Outputs and every gradient in float64 of switches, patches, convolutions, attention over
    neighbourhoods and blocks, and scans; uneven shares, and ranks that hold nothing."""
    ranks = pool8.run(everything)
    assert [rank.switched + rank.patched for rank in ranks] == [[]] * 8
    for number, case in enumerate(CONVOLVED):
        want = convolutions.reference(convolutions.CASES.index(case))
        for dim, name in ((d, n) for d in range(len(case.sizes)) for n in want):
            parts = [rank.convolved[number][dim][name] for rank in ranks]
            apart = name in ("out", "dx")
            got = torch.cat(parts, dim + 1) if apart else torch.stack(parts).sum(0)
            assert relative_error(got, want[name]) <= 1e-10, (case, dim, name)
    for number, one in enumerate(ATTENDED):
        assert [rank.attended[number][1] for rank in ranks] == [""] * 8, one
        found = attention.joined(one, [rank.attended[number][0] for rank in ranks])
        assert max(problems.errors(found, one).values()) < 1e-10, one
    for number, scan in enumerate(SCANNED):
        scans.compare(scan, [rank.scanned[number] for rank in ranks], scans.alone(scan))
