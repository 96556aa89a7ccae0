"""Cross entropy of a tile of logits: loss and gradient together. Maths in README.md."""

from types import ModuleType

import torch

from xdist_kernels.backend import form
from xdist_kernels.launch import why_not

__all__ = ["kernels", "refusal"]

_FORMS = {
    "triton": "xdist_kernels.cross_entropy.triton",
    "torch": "xdist_kernels.cross_entropy.torch",
    "reference": "xdist_kernels.cross_entropy.reference",
}


def kernels(name: str) -> ModuleType:
    """TILE_TOKENS, empty_tile and tile_loss (torch.py) by the backend `name`: triton, torch or
    reference."""
    return form(_FORMS, name)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve logits of this dtype there; None: they can."""
    return why_not(device, dtype)
