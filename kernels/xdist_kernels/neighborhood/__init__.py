"""Softmax attention over small sets of an N-D grid: neighbourhoods, blocks, strided sets."""

from types import ModuleType

from xdist_kernels.backend import form

__all__ = ["kernels", "refusal"]

_FORMS = {
    "torch": "xdist_kernels.neighborhood.torch",
    "reference": "xdist_kernels.neighborhood.run_reference",
}


def kernels(name: str) -> ModuleType:
    """forward, backward and zeros (torch.py) by the backend `name`: torch or reference."""
    return form(_FORMS, name)


def refusal() -> str:
    """Why Triton cannot serve."""
    return "there is no Triton kernel for it"
