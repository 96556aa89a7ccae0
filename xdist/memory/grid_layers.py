"""What checkpoint_grid must know of a layer, found by giving it a token of zeros.

Which calls with a state it makes and how large the states are, what its output looks like, and
whether it can be run in chunks at all. Shapes alone decide, so that every rank finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdist.cost import grid as cost
from xdist.documents import Documents
from xdist.errors import ShapeError
from xdist.memory.carry import Call, Carry, Journey, NeedsWholeSequence

PROBES = (128, 256)  # tokens: what autograd keeps of a token is the slope between the two


@dataclass(frozen=True, eq=False)
class Described:
    """A layer: its calls with a state, their bytes, an output for one token, [B, 1, ...]."""

    module: nn.Module
    calls: tuple[Call, ...]
    state_bytes: int
    output: Tensor
    whole: bool


def describe(layers: Sequence[nn.Module], x: Tensor, *, ordered: bool) -> list[Described]:
    """Every layer, the first with inputs like x [B, n, ...].

    ordered: no convolution may read what a recurrence of its layer gave.

    Raises:
        ShapeError: one does.
    """
    found = []
    one = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    for number, module in enumerate(layers):
        described = _one(module, one, number, ordered)
        found.append(described)
        one = torch.zeros_like(described.output)
    return found


def _one(module: nn.Module, token: Tensor, number: int, ordered: bool) -> Described:
    carry = _Watching(0, 1, Documents((0, 1)), token.device)
    try:
        with torch.set_grad_enabled(ordered):
            floating = token.is_floating_point()
            output = module(token.clone().requires_grad_(ordered and floating), carry)
    except NeedsWholeSequence:
        with torch.no_grad():
            return Described(module, (), 0, module(token, None).detach(), True)
    if carry.mixed and ordered:
        raise ShapeError(
            "checkpoint_grid cannot run this layer in chunks over several segments",
            f"in layer {number} ({type(module).__name__}) call {carry.mixed[0]}, a convolution, "
            "reads what a recurrence gave",
            "make two layers of it, so that the convolution comes first in its own",
        )
    size = sum(state.nbytes for state in carry.outgoing)
    calls = tuple(
        call if call.journey is None else call._replace(journey=_small(call.journey))
        for call in carry.calls
    )
    return Described(module, calls, size, output.detach(), False)


def _small(journey: Journey) -> Journey:
    """The journey without the memory of its states of no tokens, of which all numbers are equal."""
    with torch.no_grad():
        states = [
            x
            if x is None or not bool((x == x.flatten()[0]).all())
            else x.flatten()[:1].clone().expand(x.shape)
            for x in (journey.identity, journey.through)
        ]
    identity, through = states
    assert identity is not None
    rates = None if journey.rates is None else journey.rates.detach()
    return Journey(journey.transition, rates, identity, through)


class _Watching(Carry):
    """Notices convolutions that read what recurrences gave."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.made: list[Tensor] = []
        self.mixed: list[int] = []

    def take(self, call: Call, x: Tensor | None = None) -> tuple[int, Tensor | None]:
        made = [out for out in self.made if out.requires_grad]
        if x is not None and x.requires_grad and made:
            found = torch.autograd.grad(x.sum(), made, retain_graph=True, allow_unused=True)
            if any(grad is not None for grad in found):
                self.mixed.append(len(self.calls))
        return super().take(call, x)

    def put(self, state: Tensor, out: Tensor | None = None) -> None:
        if out is not None:
            self.made.append(out)
        super().put(state, out)


def problem_of(
    found: Sequence[Described], x: Tensor, *, exchanges: bool, measured: bool
) -> cost.Problem:
    """The sizes for the formula; measured: with what autograd keeps of a token in each layer."""
    layers = []
    one = x.new_zeros(x.shape[0], 1, *x.shape[2:])
    widest = 0
    for number, layer in enumerate(found):
        kept = _cell_bytes(layer, one) if measured else 0
        layers.append(cost.Layer(layer.state_bytes, kept, layer.whole))
        one = torch.zeros_like(layer.output)
        if number < len(found) - 1:
            widest = max(widest, one.nbytes)
    return cost.Problem(x.shape[1], widest, tuple(layers), exchanges)


def _cell_bytes(layer: Described, one: Tensor) -> int:
    sizes = [_saved_bytes(layer, one, tokens) for tokens in PROBES]
    return max(0, round((sizes[1] - sizes[0]) / (PROBES[1] - PROBES[0])))


def _saved_bytes(layer: Described, one: Tensor, tokens: int) -> int:
    """Bytes that autograd keeps of a call with so many tokens, parameters aside."""
    seen: dict[int, Any] = {}
    own = {p.untyped_storage().data_ptr() for p in layer.module.parameters()}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = x.untyped_storage()
        return x

    x = one.expand(-1, tokens, *one.shape[2:]).clone()
    x.requires_grad_(x.is_floating_point())
    shard = None
    if not layer.whole:
        shard = Carry(0, tokens, Documents((0, tokens)), x.device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = layer.module(x, shard)
    total = sum(storage.nbytes() for storage in seen.values())
    del out
    return total
