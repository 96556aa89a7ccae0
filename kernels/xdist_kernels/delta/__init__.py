"""The delta rule on one device: DeltaNet, Gated DeltaNet, KDA. Maths in README.md."""

from xdist_kernels.delta.backward import Gradients, Ready, adjoint, backward, backward_ahead
from xdist_kernels.delta.torch import (
    Ahead,
    Prepared,
    advance,
    ahead,
    check,
    prepare,
    run,
    transition,
)

__all__ = [
    "Ahead",
    "Gradients",
    "Prepared",
    "Ready",
    "adjoint",
    "advance",
    "ahead",
    "backward",
    "backward_ahead",
    "check",
    "prepare",
    "run",
    "transition",
]
