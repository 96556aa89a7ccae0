"""The delta rule on one device: DeltaNet, Gated DeltaNet, KDA. Maths in README.md."""

from xdist_kernels.delta.tile import (
    Ahead,
    Ready,
    Tile,
    adjoint,
    advance,
    ahead,
    backward,
    backward_ahead,
    prepare,
    run,
    transition,
)
from xdist_kernels.delta.torch import check

__all__ = [
    "Ahead",
    "Ready",
    "Tile",
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
