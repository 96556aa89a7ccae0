"""Sequence-axis x layer-axis checkpointing of a stack of layers, on one rank or under a shard.

    kept            the stream between groups of layers, and before each chunk of tokens the states
                    of every layer (its recurrences and convolutions)
    computed again  one cell, a chunk in a group, at a time: one more forward in all
    what moves      forward what the layers' own calls move, backward its adjoint; a recompute
                    sends nothing, because the states that entered a rank are among the kept ones

Where states cross ranks, layer i + 1 waits for layer i's outputs, and layer i's gradient of states
for layer i + 1's: each layer is then swept over the whole share, a group's inner streams are made
once more in backward, and a cell is a chunk in one layer. Beside its outputs a sweep is made of the
summaries of a share that others follow, and backward one of the adjoints of a share that others
precede: one more forward and backward of such a layer.

Layers that need the whole sequence (softmax attention, bidirectional ones) are recognised by what
they call. They are groups of their own: the input and what their exchanges received are kept.

Source: multi-axis gradient checkpointing, Lee et al., "Video-Ma2mba" (arXiv 2411.19460), section
3.3, there for Mamba-2 on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xdist.comm.first_order import first_order
from xdist.cost.grid import Grid
from xdist.memory.grid_cells import Sums
from xdist.memory.grid_groups import Group, HeadSum, backward_group, forward_group, head_seed
from xdist.memory.grid_plan import Plan, plan_of
from xdist.shard import SequenceShard
from xdist_kernels.autocast import Autocast, autocast_again


def checkpoint_grid(
    layers: Sequence[nn.Module],
    x: Tensor,
    shard: SequenceShard | None = None,
    *,
    chunk_tokens: int | None = None,
    group_layers: int | None = None,
    head: nn.Module | None = None,
) -> Tensor:
    """`for layer in layers: x = layer(x, shard)`, keeping a grid of checkpoints.

    Args:
        layers: modules called as `y = layer(x, shard)`, `[B, n, ...]` to `[B, n, ...]`. Tokens may
            depend on earlier ones through xdist's public recurrences and causal_conv1d, and then
            the layer is run in chunks; a layer that asks more of its shard (attention, a call in
            reverse or with states of its own) is run on the whole share. Under a shard a
            convolution must not read what a recurrence of the same layer gave. No random numbers.
        x: `[B, n, C]`, this rank's tokens, any dtype that the layers take (also token numbers).
        shard: where they lie; None is one device. Any layout, any documents.
        chunk_tokens: tokens of a chunk in one row of the batch; None: by formula.
        group_layers: layers of a group; None: by formula (xdist/cost/grid.py).
        head: a module called as `head(y, at)` on the outputs of the local tokens `at` (a slice of
            dim 1), giving a scalar; its sum over all chunks is then returned, and neither y nor
            its gradient ever exists for all tokens.

    Returns:
        y, or with a head this rank's sum, 0-dim. Backward runs once. Parameters' gradients are
        added up in float32 (float64 for float64) and are this rank's part, as everywhere.

    Saved for backward: `xdist.memory.grid.explain` says how many bytes; docs/memory.md has the
    formula. Nothing needs to divide anything.

    Raises:
        ConfigError: a layer or head is no module, or chunk_tokens or group_layers is below 1.
        ShapeError: x does not hold this rank's tokens, or (under a shard) a convolution reads what
            a recurrence gave.
    """
    measured = chunk_tokens is None or group_layers is None
    plan = plan_of(layers, x, shard, (chunk_tokens, group_layers), head, measured=measured)
    held = [p for module in (*plan.modules, *([head] if head else [])) for p in module.parameters()]
    unique = list({id(p): p for p in held}.values())
    out: Tensor = _Grid.apply(plan, x, *unique)
    return out


def explain(
    layers: Sequence[nn.Module],
    x: Tensor,
    shard: SequenceShard | None = None,
    *,
    chunk_tokens: int | None = None,
    group_layers: int | None = None,
) -> Grid:
    """The grid that `checkpoint_grid` takes, with the bytes it keeps and works with."""
    return plan_of(layers, x, shard, (chunk_tokens, group_layers), None, measured=True).grid


class _Grid(torch.autograd.Function):
    """(plan, x, *parameters) -> y, or the head's sum."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.plan, ctx.groups, ctx.autocast = plan, [], Autocast.now(x)
        ctx.save_for_backward(x, *parameters)
        head = HeadSum(plan.head) if plan.head is not None else None
        y = x
        for number, (first, stop) in enumerate(plan.groups):
            group = Group(y, plan.layers[first:stop])
            last = head if number == len(plan.groups) - 1 else None
            y = forward_group(plan, group, last)
            ctx.groups.append(group)
        # x itself is held by the graph, with its version.
        if ctx.groups:
            ctx.groups[0].x = x[:, :0]
        if head is None:
            return y.view_as(y) if y is x else y
        return head.total(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        if ctx.groups is None:
            raise RuntimeError("checkpoint_grid's backward runs once: its states are used up")
        plan, groups, ctx.groups = ctx.plan, ctx.groups, None
        sums = Sums(parameters)
        d: Tensor | None = dout if plan.head is None else None
        with autocast_again(ctx.autocast):
            for number in reversed(range(len(groups))):
                group = groups.pop()
                own = x.detach() if number == 0 else group.x
                own.requires_grad_(number > 0 or ctx.needs_input_grad[1])
                group.x = own
                top = number == len(plan.groups) - 1
                seed = head_seed(plan.head, dout) if top and plan.head is not None else None
                d = backward_group(plan, group, d, seed, sums, owned=not top)
        dx = d if ctx.needs_input_grad[1] else None
        # An empty share runs no layer, yet its gradients are zeros, as without checkpoints.
        empty = not plan.segments
        grads = [sums.of(p, of_nothing=empty) if p.requires_grad else None for p in parameters]
        return None, dx, *grads
