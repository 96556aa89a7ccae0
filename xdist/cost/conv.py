"""What the last inputs of each document cost a causal convolution that hands them on."""

from __future__ import annotations

from itertools import pairwise

from xdist.cost.moves import Moved, gather_bytes, sum_itemsize
from xdist.documents import Documents
from xdist.layout import Layout, Piece


def final_pieces(layout: Layout, documents: Documents, reach: int) -> list[list[Piece]]:
    """The tokens among the last `reach` of a document that each rank holds, in position order."""
    found: list[list[Piece]] = [[] for _ in range(layout.parts)]
    for start, stop in pairwise(documents.cu_seqlens):
        for piece in layout.owners(max(start, stop - reach), stop):
            found[piece.rank].append(piece)
    return found


def tokens_in(pieces: list[Piece]) -> int:
    """How many tokens the pieces hold."""
    return sum(piece.stop - piece.start for piece in pieces)


def conv_final_bytes(
    layout: Layout,
    documents: Documents,
    rank: int,
    *,
    width: int,
    token_elements: int,
    element_bytes: int,
    backward: bool,
) -> Moved:
    """Bytes that the final state of `xdist.causal_conv1d` adds to its halo's.

    Every rank receives the last width - 1 tokens of each document from those that hold them, once,
    in their dtype; backward their gradients are summed, in float32 or wider. `token_elements` is
    batch x channels.
    """
    sizes = [tokens_in(pieces) for pieces in final_pieces(layout, documents, width - 1)]
    moved = gather_bytes(sizes, rank, token_elements, element_bytes)
    return moved.back(element_bytes, sum_itemsize(element_bytes)) if backward else moved
