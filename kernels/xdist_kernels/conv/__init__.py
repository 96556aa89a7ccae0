"""Causal depthwise convolution on one device, with an optional SiLU. Maths in README.md."""

from xdist_kernels.conv.torch import causal_conv_backward, causal_conv_forward, check

__all__ = ["causal_conv_backward", "causal_conv_forward", "check"]
