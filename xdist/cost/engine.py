"""What an engine holds on one rank and moves in one optimizer step, as formulas; no torch.

P bytes of all parameters, s tensors of optimizer state each, R ranks of data x sequence; with fsdp
a block's whole parameters are w, those outside of blocks r; b is DeepSpeed's bucket,
`live` the parameters it keeps gathered (P, or 4 GB of a larger model).

    engine        parameters      gradients   optimizer   beside activations   at the update
    plain         P               P           s P                              3 P (sum), R > 1
    fsdp          P / R           P / R       s P / R     2 r + 4 w
    zero stage 0  P               P           s P                              2 P
    zero stage 1  P + P / R       P + P / R   s P / R     2 b                  P
    zero stage 2  P + P / R       P / R       s P / R     3 b                  P
    zero stage 3  2 P / R         P / R       s P / R     live + 3 b

ZeRO updates a copy of its part, from stage 1 on. Offload moves its part of the optimizer state,
that copy and gradients to the host, and the parameters of stage 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from xdist.cost.fsdp import Held, share_elements, unit_gather, unit_reduce_scatter
from xdist.cost.moves import Moved, reduce_bytes

# Defaults of DeepSpeed.
BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
SUM_BYTES = 8
Unit = tuple[Held, ...]


class Units(NamedTuple):
    """Parameters of a model: those of each block, and the rest.

    matrices: elements of those that Muon updates.
    """

    blocks: tuple[Unit, ...]
    rest: Unit
    matrices: int = 0

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(prod(held.shape) for unit in [*self.blocks, self.rest] for held in unit)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(_whole(unit) for unit in [*self.blocks, self.rest])


@dataclass(frozen=True)
class EngineBytes:
    """What one rank holds: between steps, and `beside` the activations or `at_update`."""

    parameters: int
    gradients: int
    optimizer: int
    beside: int = 0
    at_update: int = 0
    offloaded: int = 0  # host memory


def state_bytes(optimizer: Any, units: Units) -> int:
    """Optimizer state of all parameters: AdamW keeps two tensors of each, Muon one of its
    matrices, SGD one with momentum and none without."""
    if optimizer.name == "sgd":
        return units.bytes if optimizer.momentum else 0
    width = units.bytes // max(units.elements, 1)
    muon = units.matrices * width if optimizer.name == "muon" else 0
    return 2 * units.bytes - muon


def held_bytes(engine: Any, optimizer: Any, units: Units, ranks: int) -> EngineBytes:
    """What one rank holds under the section [engine] of a config."""
    whole, state = units.bytes, state_bytes(optimizer, units)
    if engine.name == "plain" or (engine.name == "fsdp" and ranks == 1):
        return EngineBytes(whole, whole, state, at_update=3 * whole if ranks > 1 else 0)
    if engine.name == "fsdp":
        share = sum(_share(unit, ranks) for unit in [*units.blocks, units.rest])
        largest = max((_whole(unit) for unit in units.blocks), default=0)
        gathered = 2 * _whole(units.rest) + 4 * largest
        if not engine.reshard:
            gathered += sum(_whole(unit) for unit in units.blocks) - largest
        return EngineBytes(share, share, -(-state // ranks), beside=gathered)
    return _zero(engine, whole, state, units, ranks)


def _zero(engine: Any, whole: int, state: int, units: Units, ranks: int) -> EngineBytes:
    stage = engine.zero_stage
    if stage == 0:
        return EngineBytes(whole, whole, state, at_update=2 * whole if ranks > 1 else 0)
    part, kept = -(-whole // ranks), -(-state // ranks)
    passed = engine.deepspeed.get("zero_optimization", {})
    width = whole // max(units.elements, 1)
    bucket = width * min(passed.get("reduce_bucket_size", BUCKET_ELEMENTS), units.elements)
    live = width * min(passed.get("stage3_max_live_parameters", LIVE_ELEMENTS), units.elements)
    held = {
        1: EngineBytes(whole + part, whole + part, kept, beside=2 * bucket, at_update=whole),
        2: EngineBytes(whole + part, part, kept, beside=3 * bucket, at_update=whole),
        3: EngineBytes(2 * part, part, kept, beside=live + 3 * bucket),
    }[stage]
    if engine.offload_optimizer == "cpu":
        moved = part + part + kept
        held = replace(
            held, parameters=held.parameters - part, gradients=held.gradients - part,
            optimizer=0, offloaded=moved,
        )  # fmt: skip
    if engine.offload_parameters == "cpu":
        held = replace(held, parameters=held.parameters - part, offloaded=held.offloaded + part)
    return held


def engine_moves(
    engine: Any, units: Units, ranks: int, rank: int, micro_steps: int
) -> dict[str, Moved]:
    """What the engine moves through xdist in one optimizer step: it stands in the ledger.

    plain: one reduce of all gradients. fsdp: gathers and reduce-scatters of every micro-step, and
    the reduce of one float64 (the norm). deepspeed: that reduce, from stage 1 on; its own traffic
    is that of `cost.zero`.
    """
    if ranks == 1:
        return {}
    width = units.bytes // max(units.elements, 1)
    if engine.name == "plain":
        return {"reduce": reduce_bytes(units.elements, ranks, rank, width)}
    norm = reduce_bytes(1, ranks, rank, SUM_BYTES)
    if engine.name == "deepspeed":
        return {"reduce": norm} if engine.zero_stage else {}
    gather, scatter = unit_gather(units.rest, ranks), unit_reduce_scatter(units.rest, ranks)
    for block in units.blocks:
        once = unit_gather(block, ranks)
        gather += once + once if engine.reshard else once
        scatter += unit_reduce_scatter(block, ranks)
    return {
        "reduce": norm,
        "fsdp gather": _times(gather, micro_steps),
        "fsdp reduce-scatter": _times(scatter, micro_steps),
    }


def _times(moved: Moved, count: int) -> Moved:
    return Moved(moved.sent_bytes * count, moved.received_bytes * count)


def _whole(unit: Sequence[Held]) -> int:
    return sum(prod(held.shape) * held.itemsize for held in unit)


def _share(unit: Sequence[Held], ranks: int) -> int:
    return sum(share_elements(held.shape, ranks) * held.itemsize for held in unit)
