"""Gated linear attention on one device: no, fixed, scalar or diagonal decay. Maths in README.md."""

from types import ModuleType

from torch import Tensor

from xdist_kernels.backend import form
from xdist_kernels.launch import why_not
from xdist_kernels.linear.chunks import state_dtype
from xdist_kernels.linear.inputs import canonical_decay, check
from xdist_kernels.linear.torch import (
    Prepared,
    adjoint,
    advance,
    ahead,
    backward,
    backward_ahead,
    prepare,
    run,
    transition,
)

__all__ = [
    "Prepared",
    "adjoint",
    "advance",
    "ahead",
    "backward",
    "backward_ahead",
    "canonical_decay",
    "check",
    "kernels",
    "prepare",
    "refusal",
    "run",
    "state_dtype",
    "transition",
]

_FORMS = {
    "triton": "xdist_kernels.linear.triton",
    "torch": "xdist_kernels.linear.torch",
    "reference": "xdist_kernels.linear.tile_reference",
}


def kernels(name: str) -> ModuleType:
    """The functions of a tile (torch.py) by the backend `name`: triton, torch or reference."""
    return form(_FORMS, name)


def refusal(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> str | None:
    """Why the Triton kernels cannot serve tiles of tensors such as these; None: they can."""
    why = why_not(v.device, v.dtype)
    if why is not None:
        return why
    found: str | None = kernels("triton").refusal(q, k, v, log_decay)
    return found
