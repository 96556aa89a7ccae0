"""Gated linear attention as a recurrence: no, scalar or diagonal decay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xdist.comm.scan import Transition
from xdist.parallel.recurrence import Inputs, Recurrence
from xdist_kernels import linear


class LinearAttention(Recurrence):
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    inputs: q, k [B,n,Hk,K], v [B,n,H,V], log_decay None, [B,n,H,1] or [B,n,H,K].
    """

    marks_documents = True

    def __init__(self, scale: float, transition: Transition) -> None:
        self.scale = scale
        self.transition = transition

    @classmethod
    def of(cls, inputs: Inputs, scale: float) -> LinearAttention:
        """The recurrence whose transition is that of the inputs' log_decay."""
        log_decay = inputs[3]
        if log_decay is None:
            return cls(scale, "none")
        return cls(scale, "scalar" if log_decay.shape[3] == 1 else "diagonal")

    def state_shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        _, k, v, _ = inputs
        assert k is not None
        assert v is not None
        return v.shape[0], v.shape[2], k.shape[3], v.shape[3]

    def prepare(self, inputs: Inputs, starts: Tensor | None) -> linear.Prepared:
        q, k, v, log_decay = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        return linear.prepare(q, k, v, log_decay, scale=self.scale, starts=starts)

    def transition_of(self, tile: linear.Prepared) -> Tensor | None:
        log_m = linear.transition(tile)
        return log_m.squeeze(-1) if log_m is not None and self.transition == "scalar" else log_m

    def advance(self, tile: linear.Prepared, state: Tensor) -> Tensor:
        return linear.advance(tile, state)

    def ahead(self, tile: linear.Prepared) -> linear.Prepared:
        return linear.ahead(tile)

    def run(self, tile: linear.Prepared, state: Tensor) -> tuple[Tensor, Tensor]:
        return linear.run(tile, state)

    def adjoint(self, tile: linear.Prepared, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
        return linear.adjoint(tile, dout, dstate)

    def backward_ahead(self, tile: linear.Prepared, state: Tensor, dout: Tensor) -> linear.Prepared:
        return linear.backward_ahead(tile, state, dout)

    def backward(
        self, tile: linear.Prepared, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        return linear.backward(tile, state, dout, dstate)
