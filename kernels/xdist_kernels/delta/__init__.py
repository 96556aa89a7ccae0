"""The delta rule on one device: DeltaNet, Gated DeltaNet, KDA. Maths in README.md."""

from types import ModuleType

from torch import Tensor

from xdist_kernels.backend import form
from xdist_kernels.delta.tile import (
    Ahead,
    Ready,
    Tile,
    adjoint,
    advance,
    ahead,
    backward,
    backward_ahead,
    prepare,
    run,
    transition,
)
from xdist_kernels.delta.torch import check
from xdist_kernels.launch import why_not

__all__ = [
    "Ahead",
    "Ready",
    "Tile",
    "adjoint",
    "advance",
    "ahead",
    "backward",
    "backward_ahead",
    "check",
    "kernels",
    "prepare",
    "refusal",
    "run",
    "transition",
]

_FORMS = {
    "triton": "xdist_kernels.delta.triton",
    "torch": "xdist_kernels.delta.tile",
    "reference": "xdist_kernels.delta.tile_reference",
}


def kernels(name: str) -> ModuleType:
    """The functions of a tile (tile.py) by the backend `name`: triton, torch or reference."""
    return form(_FORMS, name)


def refusal(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> str | None:
    """Why the Triton kernels cannot serve tiles of tensors such as these; None: they can."""
    why = why_not(v.device, v.dtype)
    if why is not None:
        return why
    found: str | None = kernels("triton").refusal(q, k, v, beta, log_decay)
    return found
