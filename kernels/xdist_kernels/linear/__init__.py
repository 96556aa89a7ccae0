"""Gated linear attention on one device: no, fixed, scalar or diagonal decay. Maths in README.md."""

from xdist_kernels.linear.chunks import state_dtype
from xdist_kernels.linear.diagonal import chunk_diagonal_backward, chunk_diagonal_forward
from xdist_kernels.linear.pieces import (
    adjoint_summary,
    apply_state,
    apply_state_adjoint,
    canonical_decay,
    log_transition,
    reduce_decay_gradient,
    summary,
    summary_adjoint,
    transition_adjoint,
    transition_times,
)
from xdist_kernels.linear.scalar import chunk_scalar_backward, chunk_scalar_forward
from xdist_kernels.linear.torch import (
    Saved,
    check,
    linear_attention_backward,
    linear_attention_forward,
)

__all__ = [
    "Saved",
    "adjoint_summary",
    "apply_state",
    "apply_state_adjoint",
    "canonical_decay",
    "check",
    "chunk_diagonal_backward",
    "chunk_diagonal_forward",
    "chunk_scalar_backward",
    "chunk_scalar_forward",
    "linear_attention_backward",
    "linear_attention_forward",
    "log_transition",
    "reduce_decay_gradient",
    "state_dtype",
    "summary",
    "summary_adjoint",
    "transition_adjoint",
    "transition_times",
]
