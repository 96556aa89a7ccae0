"""What the loop, the evaluation and the checkpoint ask of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from xdist.checkpoint.pieces import Piece, Spec

Read = Callable[[str], Tensor]


class Engine(Protocol):
    """Owns the parameters of `module`, their gradients and the optimizer state.

    One optimizer step is: `loss` and `backward` once per micro-step, then `finish`, then `update`
    or `drop`. Every rank makes the same calls in the same order, but for `specs`, `pieces`,
    `replicated` and `bad_parameter`, which exchange nothing.
    """

    module: nn.Module

    def loss(self, tokens: Tensor, labels: Tensor, shard: Any, *, valid_tokens: int) -> Tensor:
        """`module.loss` with the parameters in place; training and evaluation both call it.

        The global mean over `valid_tokens`, whose backward is that of this rank's own terms.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of `loss`; parts add up over ranks and calls."""

    def finish(self) -> float:
        """Bring the gradients together and clip them; the global norm before clipping.

        The norm is equal to the last bit on all ranks.
        """

    def update(self, learning_rate: float) -> None:
        """Change the parameters; the gradients are gone afterwards."""

    def drop(self) -> None:
        """Forget the gradients, change nothing."""

    def bad_parameter(self) -> str:
        """The first parameter whose own part, on this rank, was not finite in `finish`, or ""."""

    def specs(self) -> dict[str, Spec]:
        """Every tensor of a checkpoint by its neutral name, equal on all ranks and engines.

        `model/NAME` for parameters and buffers, `optimizer/exp_avg/NAME` and so on for the state.
        """

    def pieces(self) -> dict[str, Piece]:
        """What this rank writes; over the ranks each element exactly once. No communication."""

    def load(self, read: Read) -> None:
        """Take the state of a checkpoint: `read` once for each name of `specs`, in sorted order.

        `read(name)` gives the whole tensor on the CPU, on every rank. The names, shapes and dtypes
        have been checked against `specs` by the caller.
        """

    def replicated(self) -> Iterable[tuple[str, Tensor]]:
        """Tensors that must be equal to the last bit on all ranks, in the same order on all."""
