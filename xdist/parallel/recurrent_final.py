"""Final states made valid on all ranks, and the sum of their gradients brought back.

Each document's state after its last token is on the rank that holds that token. One gather gives
every rank all of them (each state travels as in a broadcast from its owner); the adjoint is a
reduce-scatter, a sum over the sequence ranks. An empty document's final state is its initial
state, which all ranks hold: nothing travels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup
from xdist.comm.gather import start_gather, start_reduce_scatter
from xdist.parallel.recurrent_tiles import Share, final_owners


@dataclass(frozen=True)
class FinalStates:
    """Final states [B, documents, ...] of a sequence whose ranks are those of `share.layout`."""

    share: Share
    group: ProcessGroup | None

    def _owned(self) -> list[list[int]]:
        """The non-empty documents whose last token each rank holds."""
        found: list[list[int]] = [[] for _ in range(self.share.layout.parts)]
        for document, owner in enumerate(final_owners(self.share)):
            if owner is not None:
                found[owner].append(document)
        return found

    def collect(self, states: dict[int, Tensor], starting: Tensor) -> Tensor:
        """All final states, from this rank's own and the initial ones [B, documents, ...]."""
        owned = self._owned()
        own = torch.stack([states[d] for d in owned[self.share.rank]], 1) if states else None
        # An op may give its states in another dtype; ranks without any expect that of `starting`.
        own = starting[:, :0] if own is None else own.to(starting.dtype)
        sizes = [len(documents) for documents in owned]
        gathered = start_gather(own.contiguous(), self.group, dim=1, sizes=sizes).wait()
        final = starting.clone()
        final[:, [d for documents in owned for d in documents]] = gathered
        return final

    def distribute(self, dfinal: Tensor, dinitial: Tensor | None) -> dict[int, Tensor]:
        """Gradients of this rank's own final states; those of empty documents go to dinitial."""
        owned = self._owned()
        order = [d for documents in owned for d in documents]
        if dinitial is not None:
            rest = sorted(set(range(self.share.documents.count)) - set(order))
            dinitial[:, rest] += dfinal[:, rest]
        sizes = [len(documents) for documents in owned]
        summed = start_reduce_scatter(dfinal[:, order], self.group, dim=1, sizes=sizes).wait()
        return dict(zip(owned[self.share.rank], summed.unbind(1), strict=True))
