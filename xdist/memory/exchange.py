"""The exchanges of a streamed layer over one shard: the halo of its input, the scan of its state.

    halo   the `width` tokens before each segment, from whichever ranks hold them; backward sends
           their gradients back, in float32 or wider
    scan   the summaries of segments (state from zero, total log decay) to the ranks whose segments
           follow in the same document; backward the adjoint states to those before

Bytes: `cost.moves.halo_bytes` and `scan_bytes`; xdist/cost/model.py adds them up for a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from xdist.comm.halo import start_halo, start_halo_adjoint
from xdist.comm.scan import Scan
from xdist.cost.moves import scan_routes
from xdist.documents import Documents
from xdist.errors import ShapeError
from xdist.layout import Layout


class Exchange:
    """What crosses segments and ranks for the layers of one batch.

    layout, documents: of the whole sequence; rank, group: this rank among the sequence ranks
    (group None: one rank, every exchange stays local).
    """

    def __init__(
        self, layout: Layout, documents: Documents, rank: int = 0, group: Any = None
    ) -> None:
        self.layout = layout
        self.documents = documents
        self.group = group
        self.segments = tuple(layout.segments(rank))
        routes = scan_routes(layout, documents.cu_seqlens)
        self._leaves = {r.piece.number: r.leaves for r in routes if r.piece.rank == rank}
        self.scans = any(route.leaves for route in routes)

    def leaves(self, segment: int) -> bool:
        """Whether the state after a local segment enters another segment."""
        return self._leaves[segment]

    def halo(self, x: Tensor, width: int) -> list[Tensor]:
        """The tokens before each local segment, [B, m, ...] with m <= width, of x [B, n, ...]."""
        if not width:
            return [x[:, :0] for _ in self.segments]
        found = start_halo(x, self.layout, self.group, dim=1, before=width).wait()
        return [one.before for one in found]

    def halo_adjoint(self, dx: Tensor, dhalo: Sequence[Tensor], width: int) -> None:
        """Adds the gradients of all ranks' halos to the dx [B, n, ...] of the tokens' owners."""
        if width:
            pairs = [(grad, grad[:, :0]) for grad in dhalo]
            start_halo_adjoint(
                pairs, dx, self.layout, self.group, dim=1, before=width, into=dx
            ).wait()

    def scan(self) -> Scan:
        """The folds of one layer's state: forward once, backward once."""
        return Scan(
            self.layout, self.group, transition="scalar", cu_seqlens=self.documents.cu_seqlens
        )


def exchange_of(shard: Any, tokens: Tensor) -> Exchange:
    """The exchange of a batch of tokens [B, n] under a shard (None: one rank holds it all).

    Raises:
        ShapeError: the tokens are not this rank's share.
    """
    if shard is None:
        n = tokens.shape[1]
        return Exchange(Layout.contiguous(n, 1), Documents.of(None, n))
    if tokens.shape[1] != shard.local_length:
        raise ShapeError(
            "tokens are not this rank's share of the sequence",
            f"{tokens.shape[1]} tokens were given, the shard holds {shard.local_length} of "
            f"{shard.layout.length}",
            "pass shard.scatter(tokens), or the slice of shard.positions",
        )
    documents = Documents.of(shard.documents, shard.layout.length)
    return Exchange(shard.layout, documents, shard.rank, shard.group)
