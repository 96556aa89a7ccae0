"""Linear attention with a feature map and a normaliser.

    o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t),   S_t = sum_{i<=t} phi(k_i) v_i^T,  z_t = sum phi(k_i)

z is one more value column (v extended by ones), so that it costs no exchange of its own.
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

FEATURE_MAPS = ("elu", "relu", "hedgehog")
# Keeps a row whose features are all zero (ReLU) at zero.
EPS = 1e-6


class LinearAttention(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H heads, K = V = head_dim, no decay.

    feature_map: "elu" is elu(x) + 1 (Katharopoulos et al. 2020, "Transformers are RNNs", equation
    7), "relu" is max(x, 0) (Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs"),
    "hedgehog" is [softmax(x W), softmax(-x W)] with W [H, K, K] learned for q and k, at first the
    identity (Zhang et al. 2024, "The Hedgehog & the Porcupine", equation 6): its state has 2K rows.
    normaliser: divide by phi(q) z as published; False leaves it out.

    Parameters: qkv [3 H K, C], out [C, H K]; map_q, map_k [H, K, K] with hedgehog.
    Moves: the scan's state, [B, H, F, K + 1] with F the features, K or 2K.

    Raises:
        ConfigError: another feature map, or head_dim does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        heads: int | None = None,
        feature_map: str = "elu",
        normaliser: bool = True,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            raise ConfigError(
                f"mixer 'linear': there is no feature map {feature_map!r}",
                f"feature maps are {', '.join(FEATURE_MAPS)}",
            )
        self.heads, self.head_dim = heads_of("linear", dim, head_dim, heads), head_dim
        self.feature_map, self.normaliser, self.strategy = feature_map, normaliser, strategy
        self.qkv = matrix(3 * self.heads * head_dim, dim)
        self.out = matrix(dim, self.heads * head_dim)
        if feature_map == "hedgehog":
            identity = torch.eye(head_dim).repeat(self.heads, 1, 1)
            self.map_q, self.map_k = nn.Parameter(identity), nn.Parameter(identity.clone())

    def features(self, x: Tensor, of: str) -> Tensor:
        """phi of queries (of "q") or keys ("k") [B, n, H, K]: [B, n, H, K], hedgehog 2K."""
        if self.feature_map == "elu":
            return F.elu(x) + 1
        if self.feature_map == "relu":
            return F.relu(x)
        mapped = wide(torch.einsum("bnhk,hkf->bnhf", x, self.map_q if of == "q" else self.map_k))
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1).to(x.dtype)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        q, k, v = split(F.linear(x, self.qkv), *[(self.heads, self.head_dim)] * 3)
        if self.normaliser:
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        q, k = self.features(q, "q"), self.features(k, "k")
        y = ops.linear_attention(q, k, v, shard, scale=1.0, strategy=self.strategy)
        assert isinstance(y, Tensor)
        if self.normaliser:
            y = y[..., :-1] / (y[..., -1:] + EPS)
        return F.linear(y.flatten(2), self.out)
