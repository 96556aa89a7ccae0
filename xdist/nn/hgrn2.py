"""HGRN-2: a gated recurrence whose input gate is what the forget gate leaves.

f_t = low + (1 - low) sigmoid(x Wf);   S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T
y = norm(silu(x Wq)_t^T S_t) Wo,   i = x Wi
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.errors import ConfigError
from xdist.nn.decay import wide
from xdist.nn.heads import heads_of, split
from xdist.nn.initial import matrix
from xdist.nn.norm import RMSNorm


def lower_bounds(gamma: Tensor) -> Tensor:
    """Lower bounds [L, C] of L layers from a learned gamma [L, C]: 0 below, growing upward.

    The cumulative sum of softmax(gamma) over the layers, without the layer's own term (Qin et al.
    2023, "Hierarchically Gated Recurrent Neural Network", equation 4).
    """
    shares = wide(gamma).softmax(0)
    return torch.cat([torch.zeros_like(shares[:1]), shares[1:].cumsum(0)])


def _bounded(raw: Tensor, low: Tensor) -> Tensor:
    """log(low + (1 - low) sigmoid(raw)), finite for any raw and any bound in [0, 1), with finite
    gradients: a bound of 0, the lowest layer's, has no logarithm."""
    free, some = F.logsigmoid(raw), low >= torch.finfo(low.dtype).tiny
    bounded = torch.logaddexp(torch.where(some, low, 1.0).log(), torch.log1p(-low) + free)
    # To the first order in the bound; the cut keeps a slope that float32 holds.
    return torch.where(some, bounded, free + low * raw.neg().clamp(max=80.0).exp())


class HGRN2(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H = C / head_dim heads, K = V = head_dim.

    Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion", equation 7; head_dim is the
    paper's expansion ratio. lower_bound in [0, 1): of this layer; `forward` takes a learned one
    [C] instead (`lower_bounds`).

    Parameters: qfi [3C, C], norm.weight [C], out [C, C].
    Moves: the scan's state and decay, [B, H, K, K] and [B, H, K].

    Raises:
        ConfigError: head_dim does not divide dim, or lower_bound is outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        lower_bound: float = 0.0,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= lower_bound < 1.0:
            raise ConfigError(f"mixer 'hgrn2': lower_bound {lower_bound:g} is outside [0, 1)")
        self.heads, self.head_dim = heads_of("hgrn2", dim, head_dim), head_dim
        self.lower_bound, self.strategy = lower_bound, strategy
        self.qfi = matrix(3 * dim, dim)
        self.norm = RMSNorm(dim)
        self.out = matrix(dim, dim)

    def forward(self, x: Tensor, shard: Any = None, *, lower_bound: Tensor | None = None) -> Tensor:
        q, raw, v = split(F.linear(x, self.qfi), *[(self.heads, self.head_dim)] * 3)
        raw = wide(raw)
        low: Tensor | float = self.lower_bound
        if lower_bound is not None:
            low = wide(lower_bound).view(self.heads, self.head_dim)
        # 1 - f without cancellation, and log f without underflow where nothing bounds it.
        k = ((1 - low) * torch.sigmoid(-raw)).to(v.dtype)
        decay = F.logsigmoid(raw)
        if isinstance(low, Tensor):
            decay = _bounded(raw, low)
        elif low > 0.0:
            decay = torch.log(low + (1 - low) * decay.exp())
        y = ops.linear_attention(
            F.silu(q), k, v, shard, log_decay=decay, scale=1.0, strategy=self.strategy
        )
        assert isinstance(y, Tensor)
        return F.linear(self.norm(y.flatten(2)), self.out)
