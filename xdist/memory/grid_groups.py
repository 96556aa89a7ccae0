"""One group of layers of a grid, forward and backward, on one rank or where states cross ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from xdist.comm import keep
from xdist.memory.allocator import stream_like
from xdist.memory.grid_cells import Seed, States, Sums, Sweep
from xdist.memory.grid_crossing import Crossing
from xdist.memory.grid_layers import Described
from xdist.memory.grid_plan import Plan


@dataclass
class Group:
    """One group between forward and backward: its input and what makes it run again."""

    x: Tensor
    layers: list[Described]
    sweeps: list[Sweep] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    tape: keep.Tape | None = None


def forward_group(plan: Plan, group: Group, head: HeadSum | None) -> Tensor:
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
    head: HeadSum | None,
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


def backward_group(
    plan: Plan, group: Group, d: Tensor | None, seed: Seed | None, sums: Sums, *, owned: bool
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


def _whole_backward(plan: Plan, group: Group, d: Tensor, sums: Sums) -> Tensor | None:
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


class HeadSum:
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


def head_seed(head: nn.Module, dout: Tensor) -> Seed:
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
