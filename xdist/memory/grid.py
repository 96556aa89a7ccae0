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

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xdist.comm import keep
from xdist.cost import grid as cost
from xdist.errors import ConfigError, ShapeError
from xdist.memory.allocator import stream_like
from xdist.memory.grid_cells import Seed, States, Sums, Sweep
from xdist.memory.grid_chunks import Segment, segments_of
from xdist.memory.grid_crossing import Crossing
from xdist.memory.grid_layers import Described, describe, problem_of
from xdist.shard import SequenceShard, resolve

_log = logging.getLogger("xdist")


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
            the layer is run in chunks; a layer that calls anything else on its shard, such as
            attention, is run on the whole share. Under a shard a convolution must not read what a
            recurrence of the same layer gave. No random numbers.
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
    plan = _plan(layers, x, shard, (chunk_tokens, group_layers), head, measured=measured)
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
) -> cost.Grid:
    """The grid that `checkpoint_grid` takes, with the bytes it keeps and works with."""
    return _plan(layers, x, shard, (chunk_tokens, group_layers), None, measured=True).grid


@dataclass
class _Plan:
    """Everything about a call that is no tensor."""

    layers: list[Described]
    shard: SequenceShard
    grid: cost.Grid
    groups: list[tuple[int, int]]
    exchanges: bool
    segments: tuple[Segment, ...]
    head: nn.Module | None

    @property
    def modules(self) -> list[nn.Module]:
        return [layer.module for layer in self.layers]


def _plan(
    layers: Sequence[nn.Module],
    x: Tensor,
    shard: SequenceShard | None,
    given: tuple[int | None, int | None],
    head: nn.Module | None,
    *,
    measured: bool,
) -> _Plan:
    chunk_tokens, group_layers = given
    for module in (*layers, *([] if head is None else [head])):
        if not isinstance(module, nn.Module):
            raise ConfigError(
                "checkpoint_grid takes modules, whose parameters it finds",
                f"got {type(module).__name__}",
                "make it an nn.Module that is called as layer(x, shard), a head as head(y, at)",
            )
    for name, value in (("chunk_tokens", chunk_tokens), ("group_layers", group_layers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1", f"got {value}")
    shard = resolve(shard, x.shape[1])
    if x.shape[1] != shard.local_length:
        raise ShapeError(
            "checkpoint_grid needs this rank's share of the sequence",
            f"x has {x.shape[1]} tokens, the shard has {shard.local_length}",
            "pass shard.scatter(x)",
        )
    exchanges = shard.group is not None or len(shard.layout.segments(shard.rank)) > 1
    found = describe(layers, x, ordered=exchanges)
    problem = problem_of(found, x, exchanges=exchanges, measured=measured)
    grid = cost.choose(problem, chunk_tokens=chunk_tokens, group_layers=group_layers)
    segments = segments_of(shard.layout, shard.rank, shard.documents, grid.chunk_tokens)
    carried = sum(not chunk.fresh for segment in segments for chunk in segment.chunks)
    grid = cost.grid(problem, grid.chunk_tokens, grid.group_layers, carried=carried)
    _log.debug("checkpoint_grid: %s", grid)
    groups = cost.groups(problem.layers, grid.group_layers)
    if head is not None and (not groups or problem.layers[-1].whole):
        groups.append((len(found), len(found)))
    return _Plan(found, shard, grid, groups, exchanges, segments, head)


@dataclass
class _Group:
    """One group between forward and backward: its input and what makes it run again."""

    x: Tensor
    layers: list[Described]
    sweeps: list[Sweep] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    tape: keep.Tape | None = None


class _Grid(torch.autograd.Function):
    """(plan, x, *parameters) -> y, or the head's sum."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.plan, ctx.groups, ctx.autocast = plan, [], _autocast_now(x.device.type)
        ctx.save_for_backward(x, *parameters)
        head = _HeadSum(plan.head) if plan.head is not None else None
        y = x
        for number, (first, stop) in enumerate(plan.groups):
            group = _Group(y, plan.layers[first:stop])
            last = head if number == len(plan.groups) - 1 else None
            y = _forward(plan, group, last)
            ctx.groups.append(group)
        # x itself is held by the graph, with its version.
        if ctx.groups:
            ctx.groups[0].x = x[:, :0]
        if head is None:
            return y.view_as(y) if y is x else y
        return head.total(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        if ctx.groups is None:
            raise RuntimeError("checkpoint_grid's backward runs once: its states are used up")
        plan, groups, ctx.groups = ctx.plan, ctx.groups, None
        sums = Sums(parameters)
        d: Tensor | None = dout if plan.head is None else None
        with _autocast_again(ctx.autocast):
            for number in reversed(range(len(groups))):
                group = groups.pop()
                own = x.detach() if number == 0 else group.x
                own.requires_grad_(number > 0 or ctx.needs_input_grad[1])
                group.x = own
                top = number == len(plan.groups) - 1
                seed = _head_seed(plan.head, dout) if top and plan.head is not None else None
                d = _backward(plan, group, d, seed, sums, owned=not top)
        dx = d if ctx.needs_input_grad[1] else None
        # An empty share runs no layer, yet its gradients are zeros, as without checkpoints.
        empty = not plan.segments
        grads = [sums.of(p, of_nothing=empty) if p.requires_grad else None for p in parameters]
        return None, dx, *grads


def _forward(plan: _Plan, group: _Group, head: _HeadSum | None) -> Tensor:
    """The group's output, which with a head is not made (its input is returned)."""
    if group.layers and group.layers[0].whole:
        with keep.recording() as group.tape:
            return group.layers[0].module(group.x, plan.shard)
    modules = [layer.module for layer in group.layers]
    if not plan.exchanges or not modules:
        sweep = Sweep(modules, plan.segments, plan.shard.documents)
        group.sweeps = [sweep]
        nothing: list[list[States]] = [[[] for _ in modules] for _ in plan.segments]
        return _swept(sweep, group.x, group.layers[-1:], nothing, head, in_place=False)
    x = group.x
    for number, layer in enumerate(group.layers):
        crossing = Crossing(layer.module, layer.calls, plan.shard, plan.segments)
        group.crossings.append(crossing)
        group.sweeps.append(crossing.sweep)
        own = head if number == len(modules) - 1 else None
        entering = crossing.enter(x)
        x = _swept(crossing.sweep, x, [layer], entering, own, in_place=number > 0)
    return x


def _swept(
    sweep: Sweep,
    x: Tensor,
    last: list[Described],
    entering: list[list[States]],
    head: _HeadSum | None,
    *,
    in_place: bool,
) -> Tensor:
    if head is not None:
        sweep.forward(x, head, entering)
        return x
    like = last[0].output if last else x
    out = x if in_place and _same(like, x) else _stream(like, x.shape[1])
    sweep.forward(x, _writer(out), entering)
    return out


def _backward(
    plan: _Plan, group: _Group, d: Tensor | None, seed: Seed | None, sums: Sums, *, owned: bool
) -> Tensor | None:
    """Gradient of the group's input from that of its output, or from a head's seed.

    owned: d may be written to.
    """
    if group.tape is not None:
        assert d is not None
        return _whole_backward(plan, group, d, sums)
    inputs = [group.x]
    for layer, sweep in zip(group.layers[:-1], group.sweeps[:-1], strict=False):
        inputs.append(_stream(layer.output, group.x.shape[1]))
        sweep.again(inputs[-2], _writer(inputs[-1]))
        inputs[-1].requires_grad_(layer.output.is_floating_point())
    while group.sweeps:
        x, sweep = inputs.pop(), group.sweeps.pop()
        target = None
        if x.requires_grad:
            fits = d is not None and owned and _same(x, d)
            target = d if fits else stream_like(x.detach())
        source = _reader(d) if seed is None else seed
        if group.crossings:
            crossing = group.crossings.pop()
            starts = sweep.backward(x, source, target, crossing.leave(x, source), sums)
            crossing.return_halos(starts, x, target, sums)
        else:
            nothing: list[list[States]] = [[[] for _ in group.layers] for _ in plan.segments]
            sweep.backward(x, source, target, nothing, sums)
        d, seed, owned = target, None, True
    return d


def _whole_backward(plan: _Plan, group: _Group, d: Tensor, sums: Sums) -> Tensor | None:
    """A layer of the whole share once more, with what its exchanges received."""
    assert group.tape is not None
    with torch.enable_grad():
        x = group.x.detach().requires_grad_(group.x.requires_grad)
        with keep.replaying(group.tape):
            y = group.layers[0].module(x, plan.shard)
    wanted = [*([x] if x.requires_grad else []), *sums.parameters]
    if not wanted or not y.requires_grad:
        return torch.zeros_like(x) if x.requires_grad else None
    found = torch.autograd.grad(y, wanted, d, allow_unused=True)
    if not x.requires_grad:
        sums.add(found)
        return None
    sums.add(found[1:])
    return torch.zeros_like(x) if found[0] is None else found[0].contiguous()


class _HeadSum:
    """Adds up what the head gives for each chunk."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.sum: Tensor | None = None

    def __call__(self, y: Tensor, at: slice) -> None:
        part = self.head(y, at)
        wide = part.to(torch.float64)
        self.sum = wide if self.sum is None else self.sum + wide
        self.dtype = torch.promote_types(part.dtype, torch.float32)

    def total(self, like: Tensor) -> Tensor:
        """The sum; 0 for a rank without tokens."""
        if self.sum is None:
            kind = like.dtype if like.is_floating_point() else torch.float32
            return torch.zeros((), dtype=torch.promote_types(kind, torch.float32))
        return self.sum.to(self.dtype)


def _head_seed(head: nn.Module, dout: Tensor) -> Seed:
    def seed(y: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        part = head(y, at)
        return part, dout.to(part.dtype)

    return seed


def _reader(d: Tensor | None) -> Seed:
    def seed(y: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        assert d is not None
        return y, d[:, at].to(y.dtype)

    return seed


def _writer(out: Tensor) -> Callable[[Tensor, slice], None]:
    def write(y: Tensor, at: slice) -> None:
        out[:, at] = y

    return write


def _same(like: Tensor, x: Tensor) -> bool:
    """Whether x can hold what is like `like`, tokens aside."""
    own = (*like.shape[:1], *like.shape[2:], like.dtype)
    return own == (*x.shape[:1], *x.shape[2:], x.dtype) and x.is_contiguous()


def _stream(like: Tensor, tokens: int) -> Tensor:
    """Room for `tokens` tokens like the one of `like`."""
    return stream_like(like.expand(-1, tokens, *like.shape[2:]))


def _autocast_now(kind: str) -> tuple[str, bool, torch.dtype]:
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@contextlib.contextmanager
def _autocast_again(state: tuple[str, bool, torch.dtype]) -> Iterator[None]:
    kind, on, dtype = state
    with torch.autocast(kind, dtype=dtype, enabled=on):
        yield
