"""What DeepSpeed itself moves for a config, where `xdist.cost.zero` knows it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from xdist.config import Config
from xdist.cost.moves import Moved
from xdist.cost.zero import PERSISTENT_ELEMENTS, micro_step, optimizer_step
from xdist.plan.model import meta_model, sizes

PERSIST = "stage3_param_persistence_threshold"
# Up to this many parameters DeepSpeed gathers each once a micro-step, by its own defaults, and
# reduces in one bucket.
KNOWN_ELEMENTS = 500_000_000


def zero_traffic(config: Config) -> Moved | None:
    """What each rank sends and receives in one optimizer step; None where it is not known.

    Known is DeepSpeed with the keys that the engine gives it, and with another threshold of
    persistence, after the first two micro-steps.
    """
    engine, ranks = config.engine, config.ranks
    passed = engine.deepspeed.get("zero_optimization", {})
    groups = groups_of(config)
    if passed.keys() - {PERSIST} or sum(map(sum, groups)) > KNOWN_ELEMENTS:
        return None
    persistent = passed.get(PERSIST, PERSISTENT_ELEMENTS)
    offload = engine.offload_optimizer == "cpu"
    stage = engine.zero_stage
    total = optimizer_step(stage, groups, ranks, persistent=persistent, offload=offload)
    for _ in range(config.train.accumulation):
        total += micro_step(stage, groups, ranks, persistent=persistent)
    return total


def groups_of(config: Config) -> list[list[int]]:
    """Elements of each parameter, in the groups of `xdist.train.optimizer`: matrices decay, and
    tables and everything else do not."""
    return [list(group) for group in _groups(sizes(config))]


@lru_cache(maxsize=8)
def _groups(of: Any) -> tuple[tuple[int, ...], ...]:
    model = meta_model(of)
    roles = model.parameter_roles()
    held = [(n, p) for n, p in model.named_parameters() if p.numel()]
    decayed = [n for n, p in held if p.ndim >= 2 and roles[n] != "table"]
    groups = (
        tuple(p.numel() for n, p in held if n in decayed),
        tuple(p.numel() for n, p in held if n not in decayed),
    )
    return tuple(group for group in groups if group)
