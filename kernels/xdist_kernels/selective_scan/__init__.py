"""The selective scan (Mamba-1) of one tile on one device. Maths in README.md."""

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
    "prepare",
    "run",
    "transition",
]
