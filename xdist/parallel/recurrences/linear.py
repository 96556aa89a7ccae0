"""Gated linear attention as a recurrence: no, scalar or diagonal decay."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from xdist.comm.scan import Transition
from xdist.parallel.recurrence import Inputs, Recurrence
from xdist_kernels import linear


class LinearAttention(Recurrence):
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    inputs: q, k [B,n,Hk,K], v [B,n,H,V], log_decay None, [B,n,H,1] or [B,n,H,K].
    """

    marks_documents = True

    def __init__(self, scale: float, transition: Transition, backend: str = "torch") -> None:
        """backend: triton, torch or reference."""
        self.scale = scale
        self.transition = transition
        self.backend = backend

    @classmethod
    def of(cls, inputs: Inputs, scale: float, backend: str = "torch") -> LinearAttention:
        """The recurrence whose transition is that of the inputs' log_decay."""
        log_decay = inputs[3]
        if log_decay is None:
            return cls(scale, "none", backend)
        return cls(scale, "scalar" if log_decay.shape[3] == 1 else "diagonal", backend)

    @property
    def kernels(self) -> ModuleType:
        return linear.kernels(self.backend)

    @property
    def kernel_tile_tokens(self) -> int | None:
        return int(self.kernels.TILE_TOKENS) if self.backend == "triton" else None

    def state_shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        _, k, v, _ = inputs
        assert k is not None
        assert v is not None
        return v.shape[0], v.shape[2], k.shape[3], v.shape[3]

    def prepare(self, inputs: Inputs, starts: Tensor | None) -> Any:
        q, k, v, log_decay = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        return self.kernels.prepare(q, k, v, log_decay, scale=self.scale, starts=starts)

    def transition_of(self, tile: Any) -> Tensor | None:
        log_m = self.kernels.transition(tile)
        return log_m.squeeze(-1) if log_m is not None and self.transition == "scalar" else log_m

    def advance(self, tile: Any, state: Tensor) -> Tensor:
        return self.kernels.advance(tile, state)

    def summarised(
        self, tile: Any, state: Tensor, *, through: bool
    ) -> tuple[Any, Tensor, Tensor | None]:
        if self.backend == "triton":
            tile = self.kernels.summed(tile)
        return super().summarised(tile, state, through=through)

    def ahead(self, tile: Any) -> Any:
        return self.kernels.ahead(tile)

    def run(self, tile: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.run(tile, state)

    def run_into(self, tile: Any, state: Tensor, out: Tensor) -> Tensor:
        if self.backend != "triton":
            return super().run_into(tile, state, out)
        after: Tensor = self.kernels.run(tile, state, out=out)[1]
        return after

    def adjoint(self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
        return self.kernels.adjoint(tile, dout, dstate)

    def summarised_back(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Any, Tensor]:
        if self.backend == "triton":
            tile = self.kernels.summed_back(tile, dout)
        return super().summarised_back(tile, state, dout, dstate)

    def backward_ahead(self, tile: Any, state: Tensor, dout: Tensor) -> Any:
        return self.kernels.backward_ahead(tile, state, dout)

    def backward(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        return self.kernels.backward(tile, state, dout, dstate)
