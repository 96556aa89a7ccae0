"""Prefix attention as a recurrence: softmax with a fixed query, its sums kept beside a maximum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist.parallel.recurrence import Inputs, Recurrence, state_dtype
from xdist_kernels import prefix


class _Inputs(NamedTuple):
    q: Tensor  # [H, D]
    k: Tensor  # [B, n, H, D]
    v: Tensor  # [B, n, H, V]


def _named(inputs: Inputs) -> _Inputs:
    return _Inputs(*(x for x in inputs if x is not None))


class PrefixAttention(Recurrence):
    """o_t = softmax_{i<=t}(scale * q . k_i) v_i.

    inputs: q [H,D] (whole), k [B,n,H,D], v [B,n,H,V]. A state [B,H,1,2+V] is (m, u, w) for
    e^m (u, w): the largest score, and the sums of e^(s-m) (1, v). Its gradient is (g, h, G) in the
    same form, and both are added up at the larger exponent.
    """

    transition = "logsumexp"
    whole = frozenset({0})
    marks_documents = True

    def __init__(self, scale: float, backend: str = "torch") -> None:
        """backend: torch or reference."""
        self.scale = scale
        self.backend = backend

    @property
    def kernels(self) -> ModuleType:
        return prefix.kernels(self.backend)

    def state_shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        v = _named(inputs).v
        return v.shape[0], v.shape[2], 1, 2 + v.shape[3]

    def value_dim(self, inputs: Inputs) -> int:
        return _named(inputs).v.shape[3]

    def output_dtype(self, inputs: Inputs) -> torch.dtype:
        return _named(inputs).v.dtype

    def identity(self, inputs: Inputs) -> Tensor:
        nothing = _named(inputs).v.new_zeros(self.state_shape(inputs), dtype=state_dtype(inputs))
        nothing[..., 0] = -math.inf
        return nothing

    def prepare(self, inputs: Inputs, starts: Tensor | None) -> Any:
        return self.kernels.prepare(*_named(inputs), scale=self.scale, starts=starts)

    def transition_of(self, tile: Any) -> None:
        return None

    def advance(self, tile: Any, state: Tensor) -> Tensor:
        return self.kernels.advance(tile, state)

    def ahead(self, tile: Any) -> Any:
        return self.kernels.ahead(tile)

    def run(self, tile: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.run(tile, state)

    def adjoint(self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
        return self.kernels.adjoint(tile, state, dout, dstate)

    def backward_ahead(self, tile: Any, state: Tensor, dout: Tensor) -> Any:
        return self.kernels.backward_ahead(tile)

    def backward(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        return self.kernels.backward(tile, state, dout, dstate)
