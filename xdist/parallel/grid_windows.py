"""Attention inside blocks of a grid, inside strided sets of it, and along one of its dims.

Sharded before and after: one dim of the grid.
Moves:
    blocks    the halo of keys and values that complete the blocks which a share cuts
    strided   q, k and v dealt anew so that a rank holds whole sets, the output back (relayout)
    axial     nothing along a whole dim; along the sharded one q, k and v switch to another dim and
              the output back, or they stay and go through attention's ulysses or ring
Saved for backward: as in neighborhood.py and attention.py; a switch and a relayout save nothing.
Must divide: nothing; borders hold smaller blocks, classes differ by one position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xdist.comm.relayout import relayout
from xdist.cost.axial import Axial, axial_choice, axial_switch_dim, check_axial
from xdist.cost.neighborhood import class_layout, class_step
from xdist.cost.per_dim import PerDim, per_dim
from xdist.errors import ShapeError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.layout import Layout
from xdist.mask import Mask
from xdist.parallel import attention as attention_parallel
from xdist.parallel.backend import chosen
from xdist.parallel.neighborhood import (
    attend,
    attend_here,
    check_bias,
    check_tensors,
    check_values,
    form_of,
    make_rules,
)
from xdist.shard import DerivedShard, SequenceShard
from xdist_kernels import attention as kernels
from xdist_kernels.neighborhood.rules import Blocks, Strided


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None,
    *,
    window: PerDim,
    shift: PerDim,
    scale: float | None,
    position_bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """`xdist.window_attention`; see there."""
    name = "window_attention"
    dims = check_tensors(name, q, k, v)
    form = form_of(name, backend, q)
    gshard = resolve_grid(gshard, q, dims)
    windows = per_dim(f"{name}: window", window, dims, least=None)
    shifts = per_dim(f"{name}: shift", shift, dims, least=None)
    rules = make_rules(name, Blocks, gshard.sizes, windows, shifts)
    check_bias(name, q, position_bias, [2 * w - 1 for w in windows])
    check_values(name, gshard, q, k, v)
    return attend(q, k, v, gshard, rules, scale, position_bias, form)


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None,
    *,
    grid: PerDim,
    scale: float | None,
    position_bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """`xdist.grid_attention`; see there."""
    name = "grid_attention"
    dims = check_tensors(name, q, k, v)
    # Raises before anything is sent.
    form_of(name, backend, q)
    gshard = resolve_grid(gshard, q, dims)
    grids = check_grid(name, grid, dims)
    for x in (q, k, v):
        gshard.check(x)
    check_bias(name, q, position_bias, [2 * g - 1 for g in grids])
    check_values(name, gshard, q, k, v)
    dealt = Dealt(gshard, grids)
    inputs = [q, k, v]
    if gshard.size > 1:
        widths = [x.shape[-2] * x.shape[-1] for x in inputs]
        joined = dealt.there(torch.cat([x.flatten(-2) for x in inputs], -1))
        parts = joined.split(widths, -1)
        inputs = [part.unflatten(-1, x.shape[-2:]) for part, x in zip(parts, inputs, strict=True)]
    q, k, v = inputs
    out = dealt.attend(q, k, v, scale=scale, position_bias=position_bias, backend=backend)
    return dealt.back(out.flatten(-2)).unflatten(-1, out.shape[-2:])


def check_grid(name: str, grid: PerDim, dims: int) -> tuple[int, ...]:
    """The sizes of a set along each dim."""
    grids = per_dim(f"{name}: grid", grid, dims, least=None)
    if min(grids) < 1:
        raise ShapeError(f"{name}: a set has at least one position along each dim", f"got {grids}")
    return grids


class Dealt:
    """A grid whose ranks hold whole strided sets of the sharded dim in place of runs of it."""

    def __init__(self, gshard: GridShard, grids: Sequence[int]) -> None:
        self.gshard = gshard
        self.steps = [class_step(n, g) for n, g in zip(gshard.sizes, grids, strict=True)]
        step = self.steps[gshard.dim]
        self.layout = class_layout(gshard.sizes[gshard.dim], step, gshard.size)

    def there(self, x: Tensor) -> Tensor:
        """This rank's sets of x `[B, s1..sk, ...]`, a part of the grid."""
        return self._moved(x, self.gshard.layout, self.layout)

    def back(self, x: Tensor) -> Tensor:
        """The inverse."""
        return self._moved(x, self.layout, self.gshard.layout)

    def _moved(self, x: Tensor, source: Layout, target: Layout) -> Tensor:
        if self.gshard.size == 1:
            return x
        dim = self.gshard.dim + 1
        return relayout(x, self.gshard.group, dim=dim, source=source, target=target)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        position_bias: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention inside the sets that this rank holds; nothing moves."""
        steps = list(self.steps)
        if self.gshard.size > 1:
            # Its positions are runs of neighbouring classes, one class of each after the other.
            held = self.layout.segments(self.gshard.rank)
            steps[self.gshard.dim] = held[0][1] - held[0][0] if held else 1
        sizes = q.shape[1:-2]
        rules = [Strided(n, step) for n, step in zip(sizes, steps, strict=True)]
        form = form_of("grid_attention", backend, q)
        return attend_here(q, k, v, rules, scale, position_bias, form)


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None,
    *,
    dim: int,
    mask: Mask,
    strategy: str,
    scale: float | None,
    backend: str = "auto",
) -> Tensor:
    """`xdist.axial_attention`; see there."""
    dims = check_tensors("axial_attention", q, k, v)
    backend = chosen(
        "axial_attention",
        backend,
        q,
        lambda: kernels.refusal(q, k, v, softcap=None, dropout=None),
    )
    gshard = resolve_grid(gshard, q, dims)
    for x in (q, k, v):
        gshard.check(x)
    check_values("axial_attention", gshard, q, k, v)
    dim = gshard.along(dim).dim
    check_axial(gshard.sizes, strategy)
    if dim != gshard.dim or gshard.size == 1:
        return along(
            q, k, v, None, dim=dim, mask=mask, strategy="auto", scale=scale, backend=backend
        )
    if strategy == "auto":
        heads = (q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
        inputs = heads[0] * heads[2] + heads[1] * (heads[2] + heads[3])
        switched = (inputs, heads[0] * heads[3])
        sizes = (q.shape[0], *heads, q.element_size())
        strategy = axial_choice(Axial(gshard.sizes, dim, gshard.size, mask, *sizes, switched))
    if strategy != "switch":
        shard = DerivedShard(gshard.mesh, gshard.layout)
        return along(
            q, k, v, shard, dim=dim, mask=mask, strategy=strategy, scale=scale, backend=backend
        )
    to = axial_switch_dim(gshard.sizes, dim, gshard.size)
    (q, k, v), elsewhere = gshard.switch_many([q, k, v], to)
    out = along(q, k, v, None, dim=dim, mask=mask, strategy="auto", scale=scale, backend=backend)
    return elsewhere.switch(out, dim)[0]


def along(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None,
    *,
    dim: int,
    mask: Mask,
    strategy: str,
    scale: float | None,
    backend: str = "auto",
) -> Tensor:
    """Attention along grid dim `dim`, every other position a row of the batch."""
    rows = [x.movedim(dim + 1, -3).flatten(0, -4) for x in (q, k, v)]
    out = attention_parallel.attention(
        rows[0],
        rows[1],
        rows[2],
        shard,
        mask=mask,
        strategy=strategy,
        scale=scale,
        softcap=None,
        sinks=None,
        key_shard="same",
        dropout=None,
        head_chunks=1,
        backend=backend,
    )
    others = [n for number, n in enumerate(q.shape[:-2]) if number != dim + 1]
    return out.unflatten(0, others).movedim(-3, dim + 1)
