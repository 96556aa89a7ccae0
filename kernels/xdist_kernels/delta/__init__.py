"""The delta rule on one device: DeltaNet, Gated DeltaNet, KDA. Maths in README.md."""

from xdist_kernels.delta.backward import Gradients, Ready, adjoint, backward, ready
from xdist_kernels.delta.torch import Prepared, advance, ahead, prepare, run, transition

__all__ = [
    "Gradients",
    "Prepared",
    "Ready",
    "adjoint",
    "advance",
    "ahead",
    "backward",
    "prepare",
    "ready",
    "run",
    "transition",
]
