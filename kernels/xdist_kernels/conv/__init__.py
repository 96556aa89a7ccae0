"""Causal depthwise convolution on one device, with an optional SiLU. Maths in README.md."""

from types import ModuleType

from torch import Tensor

from xdist_kernels.backend import form
from xdist_kernels.conv.torch import causal_conv_backward, causal_conv_forward, check
from xdist_kernels.launch import why_not

__all__ = ["causal_conv_backward", "causal_conv_forward", "check", "kernels", "refusal"]

_FORMS = {
    "triton": "xdist_kernels.conv.triton",
    "torch": "xdist_kernels.conv.torch",
    "reference": "xdist_kernels.conv.run_reference",
}


def kernels(name: str) -> ModuleType:
    """causal_conv_forward and causal_conv_backward (torch.py) by the backend `name`: triton, torch
    or reference."""
    return form(_FORMS, name)


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str | None:
    """Why the Triton kernels cannot serve tensors such as these; None: they can."""
    why = why_not(x.device, x.dtype)
    if why is not None:
        return why
    found: str | None = kernels("triton").refusal(x, weight, bias, activation)
    return found
