"""Sparse state expansion: a state of many partitions, of which each token uses a few.

    p = softmax(x We), kept where it is among the top k;   partition i, only at its own tokens:
    S_t^i = diag(alpha_t) S_{t-1}^i + p_ti k_t v_t^T
    o_t = K^-0.5 (sum_i p_ti q_t^T S_t^i + q'_t^T S'_t)

A partition neither decays nor is written at tokens of others. S' is shared by all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.errors import ConfigError
from xdist.nn.decay import sigmoid_decay, wide
from xdist.nn.head_norm import HeadNorm
from xdist.nn.heads import heads_of, split
from xdist.nn.initial import matrix


class SparseStateExpansion(nn.Module):
    """y = mixer(x, shard), [B, n, C] -> [B, n, C]; H heads, K = V = head_dim, N partitions.

    Pan et al. 2025, "Scaling Linear Attention with Sparse State Expansion" (arXiv 2507.16577),
    section 3: keys are a softmax over the rows of the state (a classification), queries and values
    SiLU; memories are those of gated linear attention. The partitions share all projections; their
    queries and keys add a low-rank term to those of the shared partition (shared=False leaves
    that one out). top_k = partitions is the dense form.

    All partitions are heads of one `xdist.linear_attention`: (N + 1) H heads, one exchange.
    A choice among the top k is made token by token; it is the same on any number of ranks unless
    two shares p are equal to rounding.

    Parameters: qkv [3 H K, C], extra_down [2 R, C], extra_up [2, H K, R], route [N, C],
    gate_down [16 x memories, C], gate_up [memories, H K, 16], gate_bias [memories, H K], where
    memories is 2 with a shared partition and 1 without; out_down [R, C], out_up [H K, R],
    norm.weight [K], out [C, H K]; R = head_dim.
    Moves: the scan's states and decays, [B, (N + 1) H, K, K] and [B, (N + 1) H, K].

    Raises:
        ConfigError: top_k outside 1..partitions, or head_dim does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        heads: int | None = None,
        partitions: int = 4,
        top_k: int = 1,
        shared: bool = True,
        gate_rank: int = 16,
        gate_normaliser: float = 16.0,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= partitions:
            raise ConfigError(
                "mixer 'sse': a token uses between one and all partitions",
                f"top_k is {top_k} of {partitions} partitions",
            )
        self.heads, self.head_dim = heads_of("sse", dim, head_dim, heads), head_dim
        self.partitions, self.top_k, self.shared = partitions, top_k, shared
        self.gate_normaliser, self.strategy = gate_normaliser, strategy
        width, memories = self.heads * head_dim, 2 if shared else 1
        self.qkv, self.route = matrix(3 * width, dim), matrix(partitions, dim)
        self.extra_down = matrix(2 * head_dim, dim)
        self.extra_up = nn.Parameter(torch.stack([matrix(width, head_dim) for _ in range(2)]))
        self.gate_down = matrix(memories * gate_rank, dim)
        ups: list[Tensor] = [matrix(width, gate_rank) for _ in range(memories)]
        self.gate_up = nn.Parameter(torch.stack(ups))
        self.gate_bias = nn.Parameter(torch.zeros(memories, width))
        self.out_down, self.out_up = matrix(head_dim, dim), matrix(width, head_dim)
        self.norm = HeadNorm(head_dim)
        self.out = matrix(dim, width)

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p and which partitions are used (1 or 0), [B, n, N]; p is 0 where they are not."""
        shares = wide(F.linear(x, self.route)).softmax(-1)
        chosen = shares.detach().topk(self.top_k, -1).indices
        used = torch.zeros_like(shares).scatter_(-1, chosen, 1.0)
        return shares * used, used

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        shape = (self.heads, self.head_dim)
        q, k, v = split(F.linear(x, self.qkv), shape, shape, shape)
        extra = F.linear(x, self.extra_down).unflatten(-1, (2, -1))
        more = torch.einsum("bnmr,mwr->bnmw", extra, self.extra_up).unflatten(-1, shape)
        sparse_q, sparse_k = F.silu(q + more[:, :, 0]), _classes(k + more[:, :, 1])
        down = F.linear(x, self.gate_down).unflatten(-1, (self.gate_up.shape[0], -1))
        raw = torch.einsum("bnmr,mwr->bnmw", down, self.gate_up) + self.gate_bias
        decays = sigmoid_decay(raw, self.gate_normaliser).unflatten(-1, shape)
        share, used = (part[..., None, None] for part in self.routing(x))  # [B, n, N, 1, 1]
        p = share.to(q.dtype)
        qs, ks = sparse_q[:, :, None] * p, sparse_k[:, :, None] * p
        gs = decays[:, :, :1] * used
        if self.shared:
            qs = torch.cat([qs, F.silu(q)[:, :, None]], 2)
            ks = torch.cat([ks, _classes(k)[:, :, None]], 2)
            gs = torch.cat([gs, decays[:, :, 1:]], 2)
        values = F.silu(v)[:, :, None].expand(-1, -1, qs.shape[2], -1, -1)
        y = ops.linear_attention(
            qs.flatten(2, 3), ks.flatten(2, 3), values.flatten(2, 3), shard,
            log_decay=gs.flatten(2, 3), strategy=self.strategy,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        y = y.unflatten(2, (-1, self.heads)).sum(2)
        gate = F.linear(F.linear(x, self.out_down), self.out_up).unflatten(-1, shape)
        return F.linear(self.norm(y, gate).flatten(2), self.out)


def _classes(k: Tensor) -> Tensor:
    """Keys as a distribution over the rows of a state, [B, n, H, K]."""
    return wide(k).softmax(-1).to(k.dtype)
