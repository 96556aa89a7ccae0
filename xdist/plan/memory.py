"""Predicted peak memory of one rank, part by part.

C the model's width, n this rank's tokens of a sequence, B its rows, e bytes of an element. The
peak is at the first layer's backward to run: then the input of every layer but the first (which is
computed again from the tokens), the gradient in flight and, where a state crosses ranks, the second
buffer of the two-phase backward are alive, n B C e each. The rest is bounded by one tile.
"""

from __future__ import annotations

from xdist.config import Config
from xdist.plan.result import Memory

# Resident memory after `import torch, xdist.train` and a first backward, before any data: measured
# with torch 2.13 (CPU build) on Linux; torch's libraries are nearly all of it.
PROCESS_BYTES = 300 * 2**20
# Working set of a tile, in units of tokens x C elements of four bytes: the widest is a linear
# layer's inner backward (three times C of projections, twice, their gradients, chunk states).
TILE_ELEMENTS = 60
# Tokens, labels and the symbols made from them, int64; as many again in each batch read ahead.
TOKEN_BYTES = 8


def memory_of(config: Config, parameters: int, rows: int, tokens: int) -> Memory:
    """The parts for `rows` sequences of which this rank holds `tokens` tokens each."""
    model, ranks = config.model, config.ranks
    element = 8 if model.dtype == "float64" else 4
    activation = rows * tokens * model.dim * element
    layers = len(model.layers)
    linear = sum(kind == "linear" for kind in model.layers)
    crosses = config.parallel.sequence_ranks > 1 and linear > 0
    tile = min(config.train.tile_tokens, max(1, rows * tokens))
    heads = model.dim // model.head_dim
    states = linear * (rows * tokens // tile + 1) * rows * heads * model.head_dim**2 * element
    inputs = rows * tokens * TOKEN_BYTES * (3 + 2 * config.data.prefetch)
    return Memory(
        process=PROCESS_BYTES,
        parameters=parameters * element,
        gradients=parameters * element * (2 if ranks > 1 else 1),
        optimizer=2 * parameters * element,
        kept=(layers - 1) * activation + states + inputs,
        transients=(2 + crosses) * activation + TILE_ELEMENTS * tile * model.dim * element,
    )
