"""Convolution of a grid of up to four dims on one device. Maths in README.md."""

from types import ModuleType

from xdist_kernels.backend import form
from xdist_kernels.conv_nd.torch import Taps, check, conv_backward, conv_forward

__all__ = ["Taps", "check", "conv_backward", "conv_forward", "kernels", "refusal"]

_FORMS = {
    "torch": "xdist_kernels.conv_nd.torch",
    "reference": "xdist_kernels.conv_nd.run_reference",
}


def kernels(name: str) -> ModuleType:
    """conv_forward and conv_backward (torch.py) by the backend `name`: torch or reference."""
    return form(_FORMS, name)


def refusal() -> str:
    """Why Triton cannot serve."""
    return "there is no Triton kernel for it"
