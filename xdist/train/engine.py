"""What the loop asks of the thing that owns parameters, gradients and the optimizer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from xdist.config import Optimizer
from xdist.mesh import Mesh
from xdist.train.gradients import clip_grad_norm, gradient_norms, reduce_gradients
from xdist.train.optimizer import (
    build_optimizers,
    check_same_names,
    load_state_tensors,
    state_tensors,
)


class Engine(Protocol):
    """One optimizer step is: backward once per micro-step, then finish, then update or drop."""

    module: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of `loss`."""

    def finish(self) -> float:
        """Bring the gradients together and clip them; the global norm before clipping."""

    def update(self, learning_rate: float) -> None:
        """Change the parameters; the gradients are gone afterwards."""

    def drop(self) -> None:
        """Forget the gradients, change nothing."""

    def bad_parameter(self) -> str:
        """The first parameter whose own part, on this rank, was not finite in `finish`, or ""."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and optimizer state by name, for a checkpoint."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put `tensors` back. Raises CheckpointError when names or shapes do not fit."""


class PlainEngine:
    """Whole parameters on every rank; gradients are summed over data x sequence in one reduce."""

    def __init__(self, module: nn.Module, settings: Optimizer, mesh: Mesh) -> None:
        self.module = module
        self._mesh = mesh
        self._clip_norm = settings.clip_norm
        self._optimizers = build_optimizers(module, settings)
        self._parts: list[tuple[str, Tensor]] = []

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
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]
            optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forget the gradients."""
        self.module.zero_grad(set_to_none=True)

    def bad_parameter(self) -> str:
        """The first parameter whose part of the gradient on this rank was not finite, or ""."""
        return next((name for name, norm in self._parts if not torch.isfinite(norm)), "")

    def tensors(self) -> dict[str, Tensor]:
        """`model/NAME` for parameters and buffers, `optimizer/...` for the optimizer state."""
        model = {f"model/{n}": t.detach() for n, t in self.module.state_dict().items()}
        state = state_tensors(self.module, self._optimizers)
        return model | {f"optimizer/{name}": tensor for name, tensor in state.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy parameters in place and replace the optimizer state."""
        model = _under("model/", tensors)
        check_same_names(self.module.state_dict(), model, "model")
        self.module.load_state_dict(model)
        load_state_tensors(self.module, self._optimizers, _under("optimizer/", tensors))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
