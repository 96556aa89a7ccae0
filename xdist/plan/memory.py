"""Predicted peak memory of one rank, part by part.

Activations are those of `cost.model.activation_bytes`, what engines hold that of `cost.engine`. A
step's peak is either inside backward, with activations and an engine's gathered parameters, or
when gradients are summed or parameters updated; activations are gone by then.

Blocks below 32 MiB come from a heap that is not given back (`xdist.memory.allocator`): a stage
with streams of smaller blocks leaves its heap to the next ones, and so does the whole model that
each rank makes before an engine cuts it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from xdist.config import Config
from xdist.cost.engine import EngineBytes, Units
from xdist.cost.model import TOKEN_BYTES
from xdist.layout import Layout
from xdist.plan import model as models
from xdist.plan.result import Memory

# Resident memory of a training process in its steps, tensors left out: Python, torch 2.13 (CPU
# build), zarr, gloo. Measured on Linux with two ranks (docs/plan.md); with another build of torch
# it is another number, and on a card it stands for the host's side.
PROCESS_BYTES = 390 * 2**20
HEAP_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Work:
    """What one stage needs on one rank beside parameters, gradients and state, bytes."""

    kept: int
    transients: int
    heap: int  # of kept and transients, what lies in the heap


def work_of(config: Config, rows: int, layout: Layout, rank: int) -> Work:
    """One stage whose micro-step has `rows` sequences, of which sequence rank `rank` holds its
    share."""
    model = models.sizes(config)
    segments = config.parallel.sequence_ranks * (2 if config.parallel.layout == "zigzag" else 1)
    tokens = layout.local_length(rank)
    found = models.activations(
        model,
        layout,
        rank,
        rows=rows,
        tile_tokens=config.train.tile_tokens,
        segments=segments,
        ulysses=config.parallel.ulysses,
    )
    # Tokens and labels of the batches that are read ahead.
    kept = found.kept_bytes + config.data.prefetch * 2 * rows * tokens * TOKEN_BYTES
    stream = rows * tokens * model.dim * models.element_bytes(model)
    all_small = stream < HEAP_BLOCK_BYTES
    heap = kept + found.transient_bytes if all_small else found.tile_bytes
    return Work(kept, found.transient_bytes, heap)


def initial_heap(config: Config, units: Units) -> int:
    """Whole parameters in small blocks, of an engine that cuts them up: each rank makes the whole
    model first, and their place stays with the heap."""
    engine = config.engine
    cut = engine.name == "fsdp" or (engine.name == "deepspeed" and engine.zero_stage == 3)
    sizes = [prod(p.shape) * p.itemsize for unit in (*units.blocks, units.rest) for p in unit]
    return sum(size for size in sizes if size < HEAP_BLOCK_BYTES) if cut and config.ranks > 1 else 0


def memory_of(held: EngineBytes, works: Sequence[Work], initial: int = 0) -> Memory:
    """The parts in the last of `works`, the stages up to now; initial: as `initial_heap`."""
    now = works[-1]
    active = held.beside + now.kept + now.transients
    small = held.at_update // 3 < HEAP_BLOCK_BYTES
    heap = max(work.heap for work in works)
    if small:
        heap = max(heap, held.at_update)
    in_heap = max(now.heap, held.at_update if small else 0)
    return Memory(
        process=PROCESS_BYTES,
        parameters=held.parameters,
        gradients=held.gradients,
        optimizer=held.optimizer,
        engine=held.beside,
        kept=now.kept,
        transients=now.transients,
        update=max(0, held.at_update - active),
        retained=heap - in_heap + initial,
        offloaded=held.offloaded,
    )
