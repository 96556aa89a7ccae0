"""Whole parameters on every rank.

What is sharded: nothing. What moves: one reduce of all gradients over data x sequence ranks
(`xdist.reduce_gradients`). What is saved: parameters, gradients and optimizer state, whole on
every rank. What must divide what: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from xdist.checkpoint.pieces import Piece, Spec
from xdist.config import Optimizer
from xdist.mesh import Mesh
from xdist.train.engines.protocol import Read
from xdist.train.gradients import clip_grad_norm, gradient_norms, reduce_gradients
from xdist.train.optimizer import (
    build_optimizers,
    put_state,
    set_rates,
    state_specs,
    state_tensors,
    trained,
)


class PlainEngine:
    """Gradients are summed over data x sequence in one reduce; every rank makes the same update."""

    def __init__(self, module: nn.Module, settings: Optimizer, mesh: Mesh) -> None:
        self.module = module
        self._mesh = mesh
        self._clip_norm = settings.clip_norm
        self._trained = trained(module)
        self._optimizers = build_optimizers(module, settings)
        self._parts: list[tuple[str, Tensor]] = []

    def loss(self, tokens: Tensor, labels: Tensor, shard: Any, *, valid_tokens: int) -> Tensor:
        """`module.loss` itself."""
        loss: Tensor = self.module.loss(  # type: ignore[operator]
            tokens, labels, shard, valid_tokens=valid_tokens
        )
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's terms (their sum over ranks is the gradient)."""
        loss.backward()

    def finish(self) -> float:
        """Sum gradients over data x sequence and clip; equal on all ranks to the last bit."""
        held = [(n, p.grad) for n, p in self.module.named_parameters() if p.grad is not None]
        norms = gradient_norms([gradient for _, gradient in held])
        # Kept until the next step: after the sum nobody can tell whose part was bad.
        self._parts = [(name, norm) for (name, _), norm in zip(held, norms, strict=True)]
        reduce_gradients(self.module, self._mesh)
        return float(clip_grad_norm(self.module, self._clip_norm, self._mesh))

    def update(self, learning_rate: float) -> None:
        """One step of every optimizer, the same on every rank."""
        set_rates(self._optimizers, learning_rate)
        for optimizer in self._optimizers:
            optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forget the gradients."""
        self.module.zero_grad(set_to_none=True)

    def bad_parameter(self) -> str:
        """The first parameter whose part of the gradient on this rank was not finite, or ""."""
        return next((name for name, norm in self._parts if not torch.isfinite(norm)), "")

    def specs(self) -> dict[str, Spec]:
        """`model/NAME` for parameters and buffers, `optimizer/...` for the optimizer state."""
        model = {
            f"model/{n}": Spec(tuple(t.shape), t.dtype) for n, t in self.module.state_dict().items()
        }
        state = state_specs(self._trained, self._optimizers)
        return model | {f"optimizer/{name}": spec for name, spec in state.items()}

    def pieces(self) -> dict[str, Piece]:
        """Everything on rank 0, nothing on the others: they hold the same."""
        if self._mesh.world_rank != 0:
            return {}
        return {
            name: Piece(tuple(t.shape), 0, t.reshape(-1)) for name, t in self._tensors().items()
        }

    def load(self, read: Read) -> None:
        """Copy parameters in place and replace the optimizer state."""
        model = {f"model/{n}": t for n, t in self.module.state_dict().items()}
        for name in sorted(self.specs()):
            values = read(name)
            if name in model:
                model[name].copy_(values)
            else:
                kept = name.removeprefix("optimizer/")
                put_state(self._trained, self._optimizers, kept, values)

    def replicated(self) -> Iterable[tuple[str, Tensor]]:
        """Everything a checkpoint holds."""
        return self._tensors().items()

    def _tensors(self) -> dict[str, Tensor]:
        model = {f"model/{n}": t.detach() for n, t in self.module.state_dict().items()}
        state = state_tensors(self._trained, self._optimizers)
        return model | {f"optimizer/{name}": tensor for name, tensor in state.items()}
