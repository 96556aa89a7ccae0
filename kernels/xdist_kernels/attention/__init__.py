"""Softmax attention on one device: blockwise with any visibility, and the sliding window."""

from types import ModuleType

from torch import Tensor

from xdist_kernels.backend import form
from xdist_kernels.launch import why_not

__all__ = ["kernels", "refusal"]

_FORMS = {
    "triton": "xdist_kernels.attention.triton",
    "torch": "xdist_kernels.attention.torch",
    "reference": "xdist_kernels.attention.call_reference",
}


def kernels(name: str) -> ModuleType:
    """attention_forward, attention_backward, attention_delta and sinks_backward (torch.py) by the
    backend `name`: triton, torch or reference."""
    return form(_FORMS, name)


def refusal(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None, dropout: object | None
) -> str | None:
    """Why the Triton kernels cannot serve tensors such as these; None: they can. `dropout` is None
    where nothing is dropped."""
    why = why_not(q.device, q.dtype)
    if why is not None:
        return why
    found: str | None = kernels("triton").refusal(q, k, v, softcap=softcap, dropout=dropout)
    return found
