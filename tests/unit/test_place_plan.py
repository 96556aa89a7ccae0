"""`xdist plan` of a model of grids prints where it switches, and why."""

from __future__ import annotations

from xdist.config import parse
from xdist.models import build, sizes_of
from xdist.plan import plan

TEXT = """
[model]
kind = "vdt"
sizes = [4, 6, 6]
patch = [1, 2, 2]
dim = 8
head_dim = 4
depth = 2
[parallel]
ring = 2
[data]
kind = "video"
[train]
curriculum = [{ crop = [4, 6, 4], batch = 2, steps = 1 }, { batch = 1, steps = 1 }]
"""


def test_the_plan_prints_the_placement_and_why() -> None:
    """One table for each size of sample: blocks, sharded dims, bytes, what others would cost."""
    config = parse(TEXT)
    model = build(sizes_of(config.model, config.parallel))
    table = plan(config).table()
    for sizes, batch in (((4, 6, 4), 2), ((4, 6, 6), 1)):
        placed = model.placement(2, sizes=sizes, dim=0, batch=batch)
        lines = placed.table().splitlines()
        assert all(line.strip() in table for line in lines)
        assert placed.switches > 0
    assert "needs dim 0 whole" in table
    assert "needs dims 1, 2 whole" in table
