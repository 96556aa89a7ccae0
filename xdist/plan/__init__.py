"""A run before it starts: bytes across ranks, peak memory, FLOPs. Needs no process group."""

from __future__ import annotations

from xdist.plan.result import Memory, Plan, StagePlan, Traffic
from xdist.plan.step import pass_bytes, peak_memory, plan, step_bytes

__all__ = [
    "Memory",
    "Plan",
    "StagePlan",
    "Traffic",
    "pass_bytes",
    "peak_memory",
    "plan",
    "step_bytes",
]
