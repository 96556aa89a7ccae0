"""Convolution of a grid of up to four dims on one device. Maths in README.md."""

from xdist_kernels.conv_nd.torch import Taps, check, conv_backward, conv_forward

__all__ = ["Taps", "check", "conv_backward", "conv_forward"]
