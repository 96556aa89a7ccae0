"""A run before it starts: bytes across ranks, peak memory, FLOPs. Needs no process group."""

from __future__ import annotations

from xdist.cost.dsp import Video, comparison
from xdist.cost.dsp_time import Cluster, predict
from xdist.cost.place import Block, Placement, place_switches
from xdist.plan.grids import grid_step
from xdist.plan.rehearsal import rehearse
from xdist.plan.result import Memory, Plan, StagePlan
from xdist.plan.step import (
    pass_bytes,
    peak_memory,
    plan,
    rank_bytes,
    step_bytes,
    step_memory,
    step_moves,
)

__all__ = [
    "Block",
    "Cluster",
    "Memory",
    "Placement",
    "Plan",
    "StagePlan",
    "Video",
    "comparison",
    "grid_step",
    "pass_bytes",
    "peak_memory",
    "place_switches",
    "plan",
    "predict",
    "rank_bytes",
    "rehearse",
    "step_bytes",
    "step_memory",
    "step_moves",
]
