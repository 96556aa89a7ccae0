"""The selective scan (Mamba-1) as a recurrence: a decay for every channel and state."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from xdist.parallel.recurrence import Inputs, Recurrence, state_dtype
from xdist_kernels import selective_scan
from xdist_kernels.selective_scan.blocks import LONGEST_CHUNK, STEP_NUMBERS


class _Inputs(NamedTuple):
    u: Tensor  # [B, n, C, 1]
    delta: Tensor  # [B, n, C, 1]
    A: Tensor  # [C, N]
    B: Tensor  # [B, n, 1, N]
    C: Tensor  # [B, n, 1, N]


def _named(inputs: Inputs) -> _Inputs:
    return _Inputs(*(x for x in inputs if x is not None))


class SelectiveScan(Recurrence):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = <C_t, h_t>.

    inputs: u, delta [B,n,C,1], A [C,N] (whole), B, C [B,n,1,N]; a state is [B,C,N,1]. What travels
    of a transition is the sum of delta, one number a channel: A is on every rank.
    """

    transition = "diagonal"
    whole = frozenset({2})
    marks_documents = True

    def __init__(self, backend: str = "torch") -> None:
        """backend: triton, torch or reference."""
        self.backend = backend

    @property
    def kernels(self) -> ModuleType:
        return selective_scan.kernels(self.backend)

    @property
    def kernel_tile_tokens(self) -> int | None:
        return int(self.kernels.TILE_TOKENS) if self.backend == "triton" else None

    def state_shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        x = _named(inputs)
        return x.u.shape[0], x.A.shape[0], x.A.shape[1], 1

    def rates_of(self, inputs: Inputs) -> Tensor | None:
        return _named(inputs).A.to(state_dtype(inputs))

    def row_tile_tokens(self, inputs: Inputs) -> int:
        # A step works on one token of every chunk at once: few channels need many chunks.
        batch, channels, states, _ = self.state_shape(inputs)
        chunks = STEP_NUMBERS // 2 // max(1, batch * channels * states)
        return max(self.tile_tokens(inputs), chunks * LONGEST_CHUNK)

    def prepare(self, inputs: Inputs, starts: Tensor | None) -> Any:
        return self.kernels.prepare(*_named(inputs), starts)

    def transition_of(self, tile: Any) -> Tensor:
        return self.kernels.transition(tile)

    def advance(self, tile: Any, state: Tensor) -> Tensor:
        return self.kernels.advance(tile, state)

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
        return self.kernels.backward_ahead(tile, dout)

    def backward(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        return self.kernels.backward(tile, state, dout, dstate)
