"""Softmax attention over some dims of a grid, and an MLP: four ways to run them over ranks.

Every position attends to the positions that share its place in the other dims: over time for each
pixel, over space for each frame. Dynamic sequence parallelism switches the grid before it calls
this, so that the attended dims are whole and `way="local"` moves nothing. The other ways embed a
sharded method in the attention itself, and leave the grid as it is.

With n of the N tokens and h of the H heads on this rank, M = B N C elements, even shares:

way      sharded inside      moves, forward (received, elements)          must divide
local    as before           nothing; the attended dims must be whole     nothing
ulysses  the heads           4 (M/P)(P-1)/P: q, k, v there, out back      nothing
ring     as before           2 (M/P)(P-1): keys and values                nothing
tensor   heads and weights   2 (M/P)(P-1): the input gathered, the        nothing
                             outputs' sums scattered

Saved for backward: what one device saves, of this rank's part (local, ring), of its heads over all
tokens (ulysses), or the gathered input and its heads (tensor). Parameters are whole on every rank;
`tensor` reads the rows and columns of this rank's heads, and its gradients are this rank's part.

Sources: Jacobs et al. 2023 (Ulysses), Liu et al. 2023 (ring), Korthikanti et al. 2022 (sequence
parallelism beside tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.comm.gather import reduce_scatter
from xdist.comm.switch import Switch, switch_many
from xdist.errors import ConfigError, LayoutError, StrategyError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.layout import even_sizes
from xdist.mask import Mask
from xdist.nn.heads import heads_of
from xdist.shard import SequenceShard

WAYS = ("local", "ulysses", "ring", "tensor")
_EVERY = Mask(causal=False)


class FactorisedAttention(nn.Module):
    """y = attention(x, gshard), `[B, s1..sk, C]` -> `[B, s1..sk, C]`; C / head_dim heads.

    dims: the grid dims that a position sees whole; for each place in the others attention runs on
    its own, scale head_dim ** -0.5. layers: how many such branches the model adds up; the output
    projection starts smaller by its root.

    Raises:
        ConfigError: no dims, one twice, or a head_dim that does not divide C.
    """

    def __init__(
        self, dim: int, dims: Sequence[int], *, head_dim: int = 32, layers: int = 1
    ) -> None:
        super().__init__()
        if not dims or len({*dims}) != len(dims) or min(dims) < 0:
            raise ConfigError(
                "attention over a grid needs dims, each once, counted from 0",
                f"got {tuple(dims)}",
            )
        self.dims = tuple(dims)
        self.heads = heads_of("factorised attention", dim, head_dim)
        self.qkv = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)
        self.out = nn.Parameter(torch.randn(dim, dim) * (dim * layers) ** -0.5)

    def forward(self, x: Tensor, gshard: GridShard | None = None, way: str = "local") -> Tensor:
        """x `[B, s1..sk, C]`, any float dtype; way: one of `WAYS`, the same on every rank.

        Raises:
            StrategyError: an unknown way.
            LayoutError: `local` where an attended dim is sharded, or a dim the grid does not have.
            ShapeError: x is not this rank's part.
        """
        gshard = resolve_grid(gshard, x, x.dim() - 2)
        self._check(gshard, way)
        if way == "tensor":
            return self._tensor(x, gshard)
        order = self._order(gshard)
        q, k, v = self._projected(_permuted(x, order), self.qkv, self.heads)
        if way == "ulysses":
            y = self._ulysses(q, k, v, gshard, order.index(gshard.dim) + 1)
        elif way == "ring" and gshard.dim in self.dims:
            y = self._softmax(q, k, v, self._attended(gshard), "ring")
        else:
            y = self._softmax(q, k, v)
        return _permuted(y.flatten(-2) @ self.out.t(), _inverse(order))

    def _ulysses(self, q: Tensor, k: Tensor, v: Tensor, gshard: GridShard, axis: int) -> Tensor:
        heads = tuple(even_sizes(self.heads, gshard.size))
        there = Switch(axis, q.dim() - 2, gshard.shares, heads)
        q, k, v = switch_many([q, k, v], [there] * 3, gshard.group)
        return switch_many([self._softmax(q, k, v)], [there.swapped()], gshard.group)[0]

    def _tensor(self, x: Tensor, gshard: GridShard) -> Tensor:
        heads = own_part(self.heads, gshard)
        width = self.out.shape[0] // self.heads
        rows = self.qkv.unflatten(0, (3, self.heads, width))[:, heads].flatten(0, 2)
        columns = self.out.unflatten(1, (self.heads, width))[:, heads].flatten(1)
        order = self._order(gshard)
        whole = _permuted(gshard.gather(x), order)
        q, k, v = self._projected(whole, rows, heads.stop - heads.start)
        y = self._softmax(q, k, v)
        return summed(_permuted(y.flatten(-2) @ columns.t(), _inverse(order)), gshard)

    def _projected(self, x: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        width = self.out.shape[0] // self.heads
        q, k, v = (x @ weight.t()).unflatten(-1, (3, heads, width)).unbind(-3)
        return q, k, v

    def _softmax(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: SequenceShard | None = None,
        strategy: str = "auto",
    ) -> Tensor:
        """q, k, v `[B, others.., attended.., H, D]`: attention for each place in the others."""
        # No head or no token of this rank: attached, and empty. Where ranks attend together, all
        # of them take part, whatever they hold.
        if shard is None and not q.numel():
            return q + k + v
        first = q.dim() - 2 - len(self.dims)
        shape = (prod(q.shape[:first]), prod(q.shape[first:-2]), *q.shape[-2:])
        q_, k_, v_ = (x.reshape(shape) for x in (q, k, v))
        return ops.attention(q_, k_, v_, shard, mask=_EVERY, strategy=strategy).view(q.shape)

    def _attended(self, gshard: GridShard) -> SequenceShard:
        """The attended dims of one place, flattened, as a sequence on these ranks."""
        alone = [size if d in self.dims else 1 for d, size in enumerate(gshard.sizes)]
        return gshard.resized(alone).flattened

    def _order(self, gshard: GridShard) -> list[int]:
        """The grid's dims with the attended ones behind the others."""
        others = [d for d in range(len(gshard.sizes)) if d not in self.dims]
        return [*others, *sorted(self.dims)]

    def _check(self, gshard: GridShard, way: str) -> None:
        if way not in WAYS:
            raise StrategyError(
                f"attention over dims of a grid has no way {way!r}",
                f"it has {', '.join(WAYS)}",
                "choose one of those",
            )
        if max(self.dims) >= len(gshard.sizes):
            raise LayoutError(
                f"attention over the dims {self.dims}", f"the grid has {len(gshard.sizes)} dims"
            )
        if way == "local" and gshard.size > 1 and gshard.dim in self.dims:
            raise LayoutError(
                f"attention over the dims {self.dims} needs them whole",
                f"dim {gshard.dim} of {gshard.sizes} lies on {gshard.size} ranks",
                "switch the grid to another dim first, or choose the way ulysses, ring or tensor",
            )


class GridMLP(nn.Module):
    """`[B, s1..sk, C]` -> the same, GELU between; no biases.

    way: "tensor" gathers the tokens and splits the hidden width, which moves 2 (M/P)(P-1) elements
    a rank; any other word is local, as nothing is mixed between positions. layers: as in attention.
    """

    def __init__(self, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, dim) * dim**-0.5)
        self.down = nn.Parameter(torch.randn(dim, hidden) * (hidden * layers) ** -0.5)

    def forward(self, x: Tensor, gshard: GridShard, way: str) -> Tensor:
        """x `[B, s1..sk, C]`, this rank's part under `gshard`."""
        if way != "tensor":
            return F.gelu(x @ self.up.t(), approximate="tanh") @ self.down.t()
        rows = own_part(self.up.shape[0], gshard)
        hidden = F.gelu(gshard.gather(x) @ self.up[rows].t(), approximate="tanh")
        return summed(hidden @ self.down[:, rows].t(), gshard)


def own_part(length: int, gshard: GridShard) -> slice:
    """This rank's run of `length` heads or channels, as `torch.tensor_split` cuts them."""
    stops = [*accumulate(even_sizes(length, gshard.size))]
    return slice(([0, *stops])[gshard.rank], stops[gshard.rank])


def summed(x: Tensor, gshard: GridShard) -> Tensor:
    """This rank's part of the sum over ranks of x `[B, S1..Sk, C]`; backward a gather.

    The sum travels and is added in float32 (float64 for float64).
    """
    return reduce_scatter(x, gshard.group, dim=gshard.dim + 1, sizes=gshard.shares)


def _permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """x `[B, grid.., ...]` with its grid dims in `order`."""
    last = range(len(order) + 1, x.dim())
    return x.permute(0, *(d + 1 for d in order), *last)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
