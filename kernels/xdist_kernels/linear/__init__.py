"""Gated linear attention on one device: no, fixed, scalar or diagonal decay. Maths in README.md."""

from xdist_kernels.linear.chunks import state_dtype
from xdist_kernels.linear.inputs import canonical_decay, check
from xdist_kernels.linear.torch import (
    Prepared,
    adjoint,
    advance,
    ahead,
    backward,
    backward_ahead,
    prepare,
    run,
    transition,
)

__all__ = [
    "Prepared",
    "adjoint",
    "advance",
    "ahead",
    "backward",
    "backward_ahead",
    "canonical_decay",
    "check",
    "prepare",
    "run",
    "state_dtype",
    "transition",
]
