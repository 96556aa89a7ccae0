"""Prefix attention (softmax with a fixed query) of one tile on one device. Maths in README.md."""

from types import ModuleType

from xdist_kernels.backend import form
from xdist_kernels.prefix.backward import adjoint, backward, backward_ahead
from xdist_kernels.prefix.chunks import Prepared, ahead, prepare
from xdist_kernels.prefix.torch import advance, run

__all__ = [
    "Prepared",
    "adjoint",
    "advance",
    "ahead",
    "backward",
    "backward_ahead",
    "kernels",
    "prepare",
    "refusal",
    "run",
]

_FORMS = {
    "torch": "xdist_kernels.prefix",
    "reference": "xdist_kernels.prefix.tile_reference",
}


def kernels(name: str) -> ModuleType:
    """The functions of a tile (torch.py, backward.py) by the backend `name`: torch or reference."""
    return form(_FORMS, name)


def refusal() -> str:
    """Why Triton cannot serve."""
    return "there is no Triton kernel for it"
