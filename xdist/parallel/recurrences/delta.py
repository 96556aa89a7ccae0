"""The delta rule as a recurrence: no, fixed, scalar or diagonal decay."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

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

    def __init__(
        self,
        scale: float,
        *,
        fixed: bool = False,
        backend: str = "torch",
        precision: str = "ieee",
    ) -> None:
        """fixed: log_decay is [H,1]; backend: triton, torch or reference; precision: of float32
        products, which only Triton's can take otherwise than in full."""
        self.scale = scale
        self.backend = backend
        self.options = {"precision": precision} if backend == "triton" else {}
        self.whole = frozenset({4}) if fixed else frozenset()

    @property
    def kernels(self) -> ModuleType:
        return delta.kernels(self.backend)

    @property
    def kernel_tile_tokens(self) -> int | None:
        return int(self.kernels.TILE_TOKENS) if self.backend == "triton" else None

    def state_shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        _, k, v, *_ = inputs
        assert k is not None
        assert v is not None
        return v.shape[0], v.shape[2], k.shape[3], v.shape[3]

    def prepare(self, inputs: Inputs, starts: Tensor | None) -> Any:
        q, k, v, beta, log_decay = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        assert beta is not None
        if log_decay is not None and self.whole:
            log_decay = log_decay.expand(*beta.shape)
        if log_decay is not None and log_decay.shape[3] == 1:
            log_decay = log_decay.squeeze(3)
        return self.kernels.prepare(
            q, k, v, beta.squeeze(-1), log_decay, self.scale, starts, **self.options
        )

    def transition_of(self, tile: Any) -> Tensor:
        return self.kernels.transition(tile)

    def advance(self, tile: Any, state: Tensor) -> Tensor:
        return self.kernels.advance(tile, state)

    def summarised(
        self, tile: Any, state: Tensor, *, through: bool
    ) -> tuple[Any, Tensor, Tensor | None]:
        if self.backend != "triton" or not through:
            return super().summarised(tile, state, through=through)
        after, own = self.kernels.advance_and_transition(tile, state)
        return tile, after, own

    def ahead(self, tile: Any) -> Any:
        return self.kernels.ahead(tile)

    def run(self, tile: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.run(tile, state)

    def run_into(self, tile: Any, state: Tensor, out: Tensor) -> Tensor:
        if self.backend != "triton" or not out.is_contiguous():
            return super().run_into(tile, state, out)
        after: Tensor = self.kernels.run(tile, state, out=out)[1]
        return after

    def adjoint(self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
        return self.kernels.adjoint(tile, dout, dstate)

    def backward_ahead(self, tile: Any, state: Tensor, dout: Tensor) -> Any:
        return self.kernels.backward_ahead(tile, state, dout)

    def backward(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        found, before = self.kernels.backward(tile, state, dout, dstate)
        dlog = found.log_decay
        if dlog is not None and dlog.dim() == 3:
            dlog = dlog.unsqueeze(3)
        if dlog is not None and self.whole:
            dlog = dlog.sum((0, 1))
        return (found.q, found.k, found.v, found.beta.unsqueeze(-1), dlog), before
