"""Merging softmax attention over disjoint sets of keys."""

from types import ModuleType

from xdist_kernels.backend import form

__all__ = ["kernels"]

# The reference merges lists of parts; in place, between blocks, torch's is as exact as its sums.
_FORMS = {
    "triton": "xdist_kernels.merge.triton",
    "torch": "xdist_kernels.merge.torch",
    "reference": "xdist_kernels.merge.torch",
}


def kernels(name: str) -> ModuleType:
    """merge_ and merge_sinks_ (torch.py) by the backend `name`: triton, torch or reference."""
    return form(_FORMS, name)
