"""One block of a model: `h = x + mixer(norm(x)); out = h + mlp(norm(h))`.

A block can be called like any module, or streamed over tiles (nn/stack.py) through `begin`, which
gives the explicit pass of its mixer. Both forms hold the same parameters and give the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xdist.errors import ConfigError, StrategyError
from xdist.nn.attention import Attention
from xdist.nn.attention_pass import AttentionParameters, AttentionPass
from xdist.nn.linear import GatedLinearAttention
from xdist.nn.linear_pass import LinearParameters, LinearPass
from xdist.nn.mlp import SquaredReLUMLP
from xdist.nn.norm import RMSNorm
from xdist.nn.stack import StreamedBlock, Streaming
from xdist.parallel.backend import chosen


def _no_kernels() -> str:
    return "its passes over tiles are made of torch operations"


class Block(nn.Module):
    """y = block(x, shard), [B, n, C] -> [B, n, C]; with `streaming` over tiles instead."""

    def __init__(self, mixer: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SquaredReLUMLP(dim, hidden)

    def forward(
        self, x: Tensor, shard: Any = None, *, streaming: Streaming | None = None
    ) -> Tensor:
        if streaming is not None:
            y: Tensor = StreamedBlock.apply(self, streaming, x, *self.stream_parameters())
            return y
        h = x + self.mixer(self.norm(x), shard)
        return h + self.mlp(self.mlp_norm(h))

    @property
    def recurrent(self) -> bool:
        """Whether the block streams with a state (else with a window)."""
        return isinstance(self.mixer, GatedLinearAttention)

    def stream_parameters(self) -> LinearParameters | AttentionParameters:
        """The parameters in the order in which a pass takes them and gives gradients.

        Raises:
            ConfigError: the mixer cannot be streamed (unlimited or bidirectional attention).
        """
        mixer: Any = self.mixer
        tail = (self.mlp_norm.weight, self.mlp.up, self.mlp.down)
        if isinstance(mixer, GatedLinearAttention):
            return LinearParameters(
                self.norm.weight, mixer.qkv, mixer.conv, mixer.decay, mixer.decay_bias,
                mixer.gate, mixer.out_norm.weight, mixer.out, *tail,
            )  # fmt: skip
        if isinstance(mixer, Attention) and mixer.causal and mixer.window is not None:
            return AttentionParameters(self.norm.weight, mixer.q, mixer.kv, mixer.out, *tail)
        raise ConfigError(
            "this block cannot be streamed in tiles",
            f"its mixer is {mixer}; streamed are gated linear attention and causal attention with "
            "a finite window",
            "set a window, or call the block as a module",
        )

    def begin(self, dtype: torch.dtype) -> LinearPass | AttentionPass:
        """A pass over tiles with the parameters as they are now; dtype: of the matrix products.

        Its passes are made of torch operations on any device, which a GPU is warned of once.

        Raises:
            StrategyError: this process asks for other kernels (`xdist_kernels.backend`).
        """
        name = chosen("a streamed block", "auto", self.norm.weight, _no_kernels)
        if name != "torch":
            raise StrategyError(
                f"a streamed block cannot run on {name}", _no_kernels(), "ask for backend 'torch'"
            )
        held = self.stream_parameters()
        parameters = type(held)(*(parameter.detach() for parameter in held))
        if isinstance(parameters, LinearParameters):
            return LinearPass(parameters, dtype)
        mixer: Any = self.mixer
        return AttentionPass(parameters, mixer.heads, mixer.window, dtype)
