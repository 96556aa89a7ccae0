"""The delta rule as a recurrence: no, fixed, scalar or diagonal decay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xdist.comm.scan import Transition
from xdist.parallel.recurrence import Inputs, Recurrence
from xdist_kernels import delta


class DeltaRule(Recurrence):
    """S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,
    o_t = scale * S_t^T q_t.

    inputs: q, k [B,n,Hk,K], v [B,n,H,V], beta [B,n,H,1], log_decay None, [H,1] (the same for all
    tokens), [B,n,H,1] or [B,n,H,K].
    """

    transition: Transition = "matrix"
    marks_documents = True

    def __init__(self, scale: float, *, fixed: bool = False) -> None:
        """fixed: log_decay is [H,1]."""
        self.scale = scale
        self.whole = frozenset({4}) if fixed else frozenset()

    def state_shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        _, k, v, *_ = inputs
        assert k is not None
        assert v is not None
        return v.shape[0], v.shape[2], k.shape[3], v.shape[3]

    def prepare(self, inputs: Inputs, starts: Tensor | None) -> delta.Tile:
        q, k, v, beta, log_decay = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        assert beta is not None
        if log_decay is not None and self.whole:
            log_decay = log_decay.expand(*beta.shape)
        return delta.prepare(q, k, v, beta.squeeze(-1), log_decay, self.scale, starts)

    def transition_of(self, tile: delta.Tile) -> Tensor:
        return delta.transition(tile)

    def advance(self, tile: delta.Tile, state: Tensor) -> Tensor:
        return delta.advance(tile, state)

    def ahead(self, tile: delta.Tile) -> delta.Ahead:
        return delta.ahead(tile)

    def run(self, tile: delta.Tile | delta.Ahead, state: Tensor) -> tuple[Tensor, Tensor]:
        return delta.run(tile, state)

    def adjoint(self, tile: delta.Tile, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
        return delta.adjoint(tile, dout, dstate)

    def backward_ahead(self, tile: delta.Tile, state: Tensor, dout: Tensor) -> delta.Ready:
        return delta.backward_ahead(tile, state, dout)

    def backward(
        self, tile: delta.Tile | delta.Ready, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        found, before = delta.backward(tile, state, dout, dstate)
        dlog = found.log_decay
        if dlog is not None and self.whole:
            dlog = dlog.sum((0, 1))
        return (found.q, found.k, found.v, found.beta.unsqueeze(-1), dlog), before
