"""What one optimizer step of the streamed hybrid model costs: bytes by move, and peak memory.

Pure integers. n is a rank's tokens of a sequence, B its rows, C the width, H heads of D channels,
e bytes of an element of the parameters' dtype (4, or 8 for float64).

    halo     tokens of the n-grams (int64, forward only); the input of every block, conv_width - 1
             or window tokens, forward and backward
    scan     state [B, H, D, D] and decay [B, H] of each linear block, forward; state backward
    reduce   two float64 numbers of the loss (one when the valid tokens are given)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xdist.cost.moves import Moved, halo_bytes, reduce_bytes, scan_bytes
from xdist.layout import Layout

TOKEN_BYTES = 8
SUM_BYTES = 8


@dataclass(frozen=True)
class Streamed:
    """Sizes of a streamed model. kinds: "linear" or "attention" for each block, bottom to top."""

    kinds: tuple[str, ...]
    dim: int
    head_dim: int
    conv_width: int
    window: int
    ngram_reach: int
    element_bytes: int = 4
    vocab_size: int = 256

    @classmethod
    def of(cls, model: Any) -> Streamed:
        """From a config's section [model] or a HybridConfig."""
        kinds = model.layers if hasattr(model, "layers") else model.kinds
        return cls(
            tuple(kinds), model.dim, model.head_dim, model.conv_width, model.window or 0,
            max(model.ngram_orders, default=1) - 1, 8 if model.dtype == "float64" else 4,
            model.vocab_size,
        )  # fmt: skip

    def reach(self, kind: str) -> int:
        """Tokens of its input that a block reads before each token."""
        return self.conv_width - 1 if kind == "linear" else self.window


def pass_bytes(
    model: Streamed, layout: Layout, cu_seqlens: Sequence[int], rank: int, rows: int
) -> dict[str, Moved]:
    """Bytes of forward and backward of one call of the model, by move, without the loss."""
    halo = halo_bytes(layout, rank, model.ngram_reach, 0, rows, TOKEN_BYTES)
    scan = Moved()
    heads = model.dim // model.head_dim
    state = (rows, heads, model.head_dim, model.head_dim)
    for kind in model.kinds:
        edges = halo_bytes(
            layout, rank, model.reach(kind), 0, rows * model.dim, model.element_bytes
        )
        halo += edges + edges.back()
        if kind == "linear":
            for backward in (False, True):
                scan += scan_bytes(
                    layout, cu_seqlens, rank, state, "scalar", model.element_bytes,
                    backward=backward,
                )  # fmt: skip
    return {"halo": halo, "scan": scan}


def loss_bytes(ranks: int, rank: int, *, counted: bool) -> Moved:
    """The loss over `ranks` data x sequence ranks; counted: it counts the valid tokens itself."""
    one = reduce_bytes(1, ranks, rank, SUM_BYTES)
    return one + one if counted else one


# A tile's working set in units of tile tokens x C x element, counted by `xdist.dry_run` on tensors
# without values: a linear block's in backward, with D channels a head; an attention block's.
LINEAR_UNITS = 22
HEAD_DIMS_A_UNIT = 12
ATTENTION_UNITS = 11
WINDOW_A_UNIT = 256
# The loss works on tiles of its own: logits, their logarithms, the gradient and a copy; in Triton
# on tiles of four times the tokens, in place.
LOSS_TILE_TOKENS = 2048
LOSS_COPIES = 4


class Activations(NamedTuple):
    """Bytes of activations at the peak of a step: kept from forward to backward, in flight."""

    kept_bytes: int
    transient_bytes: int
    tile_bytes: int  # of the transient ones, the working set of one tile


def activation_bytes(
    model: Streamed, *, tokens: int, rows: int, tile_tokens: int, crosses: bool
) -> Activations:
    """Activations of forward and backward on a rank that holds `tokens` tokens a row.

    crosses: whether a state crosses ranks or segments (two-phase backward keeps dy of one block).
    Alive at the peak: the inputs of all blocks but the first (computed again) with the gradient in
    flight - or, in the backward of a linear block below, one input fewer with dy.
    """
    stream = rows * tokens * model.dim * model.element_bytes
    blocks = len(model.kinds)
    at_top = blocks + (crosses and model.kinds[-1] == "linear")
    below = [kind for kind in model.kinds[:-1] if kind == "linear"]
    at_next = blocks - 1 + (1 if crosses else 0) if below else 0
    tile = max(
        _units(model) * min(tile_tokens, rows * tokens) * model.dim,
        LOSS_COPIES * min(LOSS_TILE_TOKENS, tokens) * model.vocab_size,
    )
    tile *= model.element_bytes
    linear = sum(kind == "linear" for kind in model.kinds)
    tiles = -(-rows * tokens // max(tile_tokens, 1))
    states = linear * tiles * rows * model.dim * model.head_dim * model.element_bytes
    integers = 3 * rows * tokens * TOKEN_BYTES
    kept = (blocks - 1) * stream
    return Activations(kept + states + integers, max(at_top, at_next) * stream - kept + tile, tile)


def _units(model: Streamed) -> int:
    if "linear" in model.kinds:
        return LINEAR_UNITS + model.head_dim // HEAD_DIMS_A_UNIT
    return ATTENTION_UNITS + model.window // WINDOW_A_UNIT
