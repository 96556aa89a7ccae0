"""Prefix attention (softmax with a fixed query) of one tile on one device. Maths in README.md."""

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
    "prepare",
    "run",
]
