"""Predicted peak memory of one rank, part by part.

Activations are those of `cost.model.activation_bytes`. The peak of a step is inside backward; the
optimizer's update comes after the activations are gone.
"""

from __future__ import annotations

from xdist.config import Config
from xdist.cost.model import TOKEN_BYTES, Streamed, activation_bytes
from xdist.plan.result import Memory

# Resident memory of a training process before its first step, the model left out: Python, torch
# 2.13 (CPU build) and zarr. Measured on Linux; with another build of torch it is another number.
PROCESS_BYTES = 275 * 2**20


def memory_of(config: Config, parameters: int, rows: int, tokens: int) -> Memory:
    """The parts for `rows` sequences of which this rank holds `tokens` tokens each."""
    model = Streamed.of(config.model)
    several = config.ranks > 1
    segments = config.parallel.sequence_ranks * (2 if config.parallel.layout == "zigzag" else 1)
    found = activation_bytes(
        model,
        tokens=tokens,
        rows=rows,
        tile_tokens=config.train.tile_tokens,
        crosses=segments > 1 and "linear" in model.kinds,
    )
    weights = parameters * model.element_bytes
    # Tokens and labels of the batches that are read ahead.
    ahead = config.data.prefetch * 2 * rows * tokens * TOKEN_BYTES
    return Memory(
        process=PROCESS_BYTES,
        parameters=weights,
        gradients=weights * (2 if several else 1),
        optimizer=2 * weights,
        kept=found.kept_bytes + ahead,
        transients=found.transient_bytes,
    )
