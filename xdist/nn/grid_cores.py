"""What a scan layer of grids makes of its tokens for one direction of a recurrence.

A core holds the parameters of one direction: `op` is the recurrence, `arguments(u)` its inputs by
name for u [B, S1..Sk, E], and its outputs, with heads flattened, are [B, S1..Sk, E] again.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.errors import ConfigError
from xdist.nn.decay import sigmoid_decay, wide
from xdist.nn.head_norm import unit
from xdist.nn.heads import heads_of, split
from xdist.nn.initial import matrix, rate_log, step_bias


class SelectiveCore(nn.Module):
    """`xdist.selective_scan`: Mamba's direction, N = state_dim states a channel.

    Parameters: select [rank + 2N, E], step [E, rank], dt_bias [E], A_log [E, N], D [E].
    """

    op = staticmethod(ops.selective_scan)

    def __init__(self, dim: int, *, state_dim: int = 16, step_rank: int | None = None) -> None:
        super().__init__()
        rank = math.ceil(dim / 16) if step_rank is None else step_rank
        self.sizes = (rank, state_dim, state_dim)
        self.select, self.step = matrix(sum(self.sizes), dim), matrix(dim, rank)
        self.dt_bias = nn.Parameter(step_bias(dim))
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))

    def arguments(self, u: Tensor) -> dict[str, Any]:
        raw, b, c = F.linear(u, self.select).split(self.sizes, -1)
        return {
            "u": u, "delta": F.linear(raw, self.step), "A": -wide(self.A_log).exp(), "B": b, "C": c,
            "D": wide(self.D), "delta_bias": wide(self.dt_bias), "delta_softplus": True,
        }  # fmt: skip


class SSDCore(nn.Module):
    """`xdist.ssd`: Mamba-2's direction, H = E / head_dim heads over one group of B and C.

    Parameters: select [2N + H, E], dt_bias [H], A_log [H], D [H].
    """

    op = staticmethod(ops.ssd)

    def __init__(self, dim: int, *, state_dim: int = 16, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim = heads_of("ssd", dim, head_dim), head_dim
        self.sizes = (state_dim, state_dim, self.heads)
        self.select = matrix(sum(self.sizes), dim)
        self.dt_bias = nn.Parameter(step_bias(self.heads))
        self.A_log = nn.Parameter(rate_log(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))

    def arguments(self, u: Tensor) -> dict[str, Any]:
        b, c, raw = F.linear(u, self.select).split(self.sizes, -1)
        return {
            "x": u.unflatten(-1, (self.heads, self.head_dim)),
            "dt": F.softplus(wide(raw) + wide(self.dt_bias)), "A": -wide(self.A_log).exp(),
            "B": b.unsqueeze(-2), "C": c.unsqueeze(-2), "D": wide(self.D),
        }  # fmt: skip


class LinearCore(nn.Module):
    """`xdist.linear_attention` with a decay a head: H = E / head_dim heads, key_dim keys each.

    Parameters: select [2 H K, E], decay [H, E].
    """

    op = staticmethod(ops.linear_attention)

    def __init__(self, dim: int, *, key_dim: int = 16, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim, self.key_dim = (
            heads_of("linear", dim, head_dim),
            head_dim,
            key_dim,
        )
        self.select = matrix(2 * self.heads * key_dim, dim)
        self.decay = matrix(self.heads, dim)

    def arguments(self, u: Tensor) -> dict[str, Any]:
        q, k = split(F.linear(u, self.select), *((self.heads, self.key_dim),) * 2)
        return {
            "q": q, "k": k, "v": u.unflatten(-1, (self.heads, self.head_dim)),
            "log_decay": sigmoid_decay(F.linear(u, self.decay), 16.0),
        }  # fmt: skip


class DeltaCore(nn.Module):
    """`xdist.delta_rule`: H = E / head_dim heads, key_dim keys of length 1 each, beta in (0, 1).

    Parameters: select [2 H K, E], beta [H, E].
    """

    op = staticmethod(ops.delta_rule)

    def __init__(self, dim: int, *, key_dim: int = 16, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim, self.key_dim = (
            heads_of("delta", dim, head_dim),
            head_dim,
            key_dim,
        )
        self.select = matrix(2 * self.heads * key_dim, dim)
        self.beta = matrix(self.heads, dim)

    def arguments(self, u: Tensor) -> dict[str, Any]:
        q, k = split(F.linear(u, self.select), *((self.heads, self.key_dim),) * 2)
        return {
            "q": unit(q), "k": unit(k), "v": u.unflatten(-1, (self.heads, self.head_dim)),
            "beta": torch.sigmoid(wide(F.linear(u, self.beta))),
        }  # fmt: skip


CORES: dict[str, type[nn.Module]] = {
    "selective_scan": SelectiveCore,
    "ssd": SSDCore,
    "linear_attention": LinearCore,
    "delta_rule": DeltaCore,
}


def build_core(recurrence: str, dim: int, **options: Any) -> Any:
    """The core of a recurrence for width `dim`; options as in its class.

    Raises:
        ConfigError: unknown recurrence, an option it does not have, sizes that do not divide.
    """
    kind = CORES.get(recurrence)
    if kind is None:
        raise ConfigError(
            f"a scan layer has no core {recurrence!r}",
            f"the cores are {', '.join(CORES)}",
            "any registered mixer runs on a grid as xdist.nn.GridMixer",
        )
    known = [name for name in inspect.signature(kind).parameters if name != "dim"]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(
            f"core {recurrence!r} has no option {', '.join(unknown)}",
            f"its options are {', '.join(known)}",
        )
    return kind(dim, **options)
