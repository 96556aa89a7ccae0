"""Gated linear attention on one device. The maths is in README.md."""

from xdist_kernels.linear.scalar import chunk_scalar_backward, chunk_scalar_forward

__all__ = ["chunk_scalar_backward", "chunk_scalar_forward"]
