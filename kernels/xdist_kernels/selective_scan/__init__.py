"""The selective scan (Mamba-1) of one tile on one device. Maths in README.md."""

from types import ModuleType

from torch import Tensor

from xdist_kernels.backend import form
from xdist_kernels.launch import why_not
from xdist_kernels.selective_scan.backward import backward, backward_ahead
from xdist_kernels.selective_scan.blocks import Prepared, prepare
from xdist_kernels.selective_scan.torch import adjoint, advance, ahead, run, transition

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
    "transition",
]

_FORMS = {
    "triton": "xdist_kernels.selective_scan.triton",
    "torch": "xdist_kernels.selective_scan",
    "reference": "xdist_kernels.selective_scan.tile_reference",
}


def kernels(name: str) -> ModuleType:
    """The functions of a tile (torch.py, backward.py) by the backend `name`: triton, torch or
    reference."""
    return form(_FORMS, name)


def refusal(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why the Triton kernels cannot serve tiles of tensors such as these (u and delta [B,n,C,1], B
    and C [B,n,1,N]); None: they can."""
    why = why_not(u.device, u.dtype)
    if why is not None:
        return why
    found: str | None = kernels("triton").refusal(u, delta, A, B, C)
    return found
