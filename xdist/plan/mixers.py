"""What a `mixer_lm` moves, keeps and computes: from the calls that its layers make.

Each kind of layer is built once on the meta device and called there with its calls noted
(xdist.parallel.noted); the formulas of `xdist.cost` say what such a call moves under a layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from xdist.cost import recurrent as recurrent_cost
from xdist.cost.attention import moves_of
from xdist.cost.attention_choice import chosen
from xdist.cost.attention_keys import Problem as AttentionProblem
from xdist.cost.model import LOSS_COPIES, LOSS_TILE_TOKENS, TOKEN_BYTES, Activations
from xdist.cost.moves import Moved
from xdist.cost.recurrent import ConvProblem
from xdist.cost.recurrent import Problem as RecurrentProblem
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.models.mixer_lm import MixerConfig
from xdist.parallel.noted import Noted, noting
from xdist.plan.result import Moves

# Copies of each projection's output that a mixer holds at its peak in backward: itself, what
# norms, gates and the recurrence make of it, and gradients.
MIXER_COPIES = 6
# Of an MLP's hidden layer: before and after its activation, and the gradients.
MLP_COPIES = 4


@dataclass(frozen=True)
class Layers:
    """What the plan knows of each kind of layer. One row of one token was noted."""

    kinds: tuple[str, ...]
    calls: dict[str, tuple[Noted, ...]]
    matrices: dict[str, int]  # elements of a layer's matrices
    widths: dict[str, int]  # rows of its matrices: channels that it makes of a token


@lru_cache(maxsize=8)
def layers_of(config: MixerConfig) -> Layers:
    """Builds each kind of layer once, without values."""
    kinds = config.kinds
    calls: dict[str, tuple[Noted, ...]] = {}
    matrices, widths = {}, {}
    for kind in dict.fromkeys(kinds):
        if kind == "mlp":
            calls[kind], widths[kind] = (), config.hidden
            matrices[kind] = 2 * config.dim * config.hidden
            continue
        with torch.device("meta"), torch.no_grad(), noting() as noted:
            mixer = config.mixer(kind)
            dtype = torch.float64 if config.dtype == "float64" else torch.float32
            mixer.to(dtype)(torch.empty(1, 1, config.dim, dtype=dtype))
        calls[kind] = tuple(noted)
        held = [p for p in mixer.parameters() if p.ndim >= 2 and min(p.shape[-2:]) > 4]
        matrices[kind] = sum(p.numel() for p in held)
        widths[kind] = sum(p.numel() // p.shape[-1] for p in held)
    return Layers(kinds, calls, matrices, widths)


def pass_moves(
    config: MixerConfig, layout: Layout, cu_seqlens: tuple[int, ...], rank: int, rows: int,
    ulysses: int = 1,
) -> Moves:  # fmt: skip
    """Bytes of forward and backward of one call of the model, by move, without the loss; ulysses:
    the inner degree of the mesh."""
    layers = layers_of(config)
    documents = Documents.of(cu_seqlens, layout.length)
    once = {
        kind: summed(
            [
                call_moves(call, layout, documents, rank, rows, ulysses)
                for call in layers.calls[kind]
            ]
        )
        for kind in set(layers.kinds)
    }
    return summed([once[kind] for kind in layers.kinds])


def flops_per_token(config: MixerConfig, length: int) -> int:
    """Floating-point operations of a token forward in a sequence of `length` tokens.

    Products of the projections, of states (4 K V a head, and what a chunk of 64 tokens adds) and
    of scores; a query without a window sees half the sequence.
    """
    layers = layers_of(config)
    each = {kind: 2 * layers.matrices[kind] for kind in set(layers.kinds)}
    for kind in each:
        for call in layers.calls[kind]:
            each[kind] += sum(mixing_flops(problem, length) for problem in call.problems)
    return sum(each[kind] for kind in layers.kinds) + 2 * config.dim * config.vocab_size


def activation_bytes(
    config: MixerConfig, *, tokens: int, rows: int, tile_tokens: int, received: int
) -> Activations:
    """Activations of forward and backward on a rank that holds `tokens` tokens a row; received:
    bytes that arrive in forward and are kept.

    An estimate: of mixers the copies of their projections' outputs at the peak are counted, not
    what each kernel keeps.
    """
    layers = layers_of(config)
    element = 8 if config.dtype == "float64" else 4
    own = rows * tokens
    stream = own * config.dim * element
    per_row = max(1, tile_tokens // max(rows, 1))
    working = {}
    for kind in set(layers.kinds):
        if kind == "mlp":
            tile = rows * min(per_row, tokens) if config.recompute else own
            working[kind] = MLP_COPIES * tile * config.hidden * element
        else:
            working[kind] = MIXER_COPIES * own * layers.widths[kind] * element
    loss = LOSS_COPIES * min(LOSS_TILE_TOKENS, tokens) * config.vocab_size * element
    integers = 3 * own * TOKEN_BYTES
    largest = max(working.values())
    if config.recompute:
        kept = len(layers.kinds) * stream + received
        return Activations(kept + integers, 2 * stream + max(largest, loss), max(largest, loss))
    # Of what a layer makes, about half is saved for backward.
    kept = sum(working[kind] // 2 + 2 * stream for kind in layers.kinds) + received
    return Activations(kept + integers, 2 * stream + max(largest // 2, loss), loss)


def forward_received(
    config: MixerConfig, layout: Layout, rank: int, rows: int, ulysses: int = 1
) -> int:
    """Bytes that arrive on a rank in the forward pass of one call, in one document."""
    layers = layers_of(config)
    documents = Documents.of(None, layout.length)
    once = {
        kind: sum(
            call_received(call, layout, documents, rank, rows, ulysses)
            for call in layers.calls[kind]
        )
        for kind in set(layers.kinds)
    }
    return sum(once[kind] for kind in layers.kinds)


def call_received(
    call: Noted, layout: Layout, documents: Documents, rank: int, rows: int, ulysses: int = 1
) -> int:
    """Bytes that one call receives in forward."""
    forward, _ = _both_ways(call, layout, documents, rank, rows, ulysses)
    return sum(moved.received_bytes for moved in forward.values())


def call_moves(
    call: Noted, layout: Layout, documents: Documents, rank: int, rows: int, ulysses: int = 1
) -> Moves:
    """Bytes of one call, forward and backward, by move."""
    return summed(list(_both_ways(call, layout, documents, rank, rows, ulysses)))


def _both_ways(
    call: Noted, layout: Layout, documents: Documents, rank: int, rows: int, ulysses: int
) -> tuple[Moves, Moves]:
    """Bytes of one call by move, forward and backward."""
    first = call.problems[0]
    if isinstance(first, ConvProblem):
        placed = replace(first, layout=layout, batch=rows)
        ways = (recurrent_cost.conv_bytes(placed, rank, backward=back) for back in (False, True))
        forward, backward = ({"halo": moved} for moved in ways)
        return forward, backward
    if isinstance(first, AttentionProblem):
        return _attention(_placed(first, layout, documents, rows, ulysses), call.strategy, rank)
    problems = [
        replace(problem, layout=layout, documents=documents, batch=rows * problem.batch)
        for problem in call.problems
        if isinstance(problem, RecurrentProblem)
    ]
    strategy = call.strategy
    if strategy == "auto":
        strategy = recurrent_cost.choose(*problems).strategy
    found: list[Moves] = []
    for back in (False, True):
        moved = Moved()
        for problem in problems:
            moved += recurrent_cost.recurrent_bytes(problem, strategy, rank, backward=back)
        found.append({strategy: moved})
    return found[0], found[1]


@lru_cache(maxsize=16)
def _placed(
    noted: AttentionProblem, layout: Layout, documents: Documents, rows: int, ulysses: int
) -> AttentionProblem:
    """A noted call over ranks: the same object for all of them, which counts once."""
    return replace(
        noted, layout=layout, documents=documents, key_layout=layout, key_documents=documents,
        batch=rows, ulysses=ulysses,
    )  # fmt: skip


def _attention(problem: AttentionProblem, strategy: str, rank: int) -> tuple[Moves, Moves]:
    if strategy == "auto":
        strategy = chosen(problem).strategy
    moves = moves_of(problem, strategy, rank)
    forward = {name: Moved(*moved[:2]) for name, moved in moves.items()}
    return forward, {name: Moved(*moved[2:]) for name, moved in moves.items()}


def mixing_flops(problem: object, length: int) -> int:
    """Floating-point operations of a token in one call's states or scores, forward."""
    if isinstance(problem, ConvProblem):
        return 2 * problem.channels * problem.width
    if isinstance(problem, AttentionProblem):
        left = problem.mask.reach[0]
        seen = length // 2 if left is None else min(left + 1, length)
        return 2 * problem.heads * (problem.dim + problem.value_dim) * seen
    assert isinstance(problem, RecurrentProblem)
    state, chunk = problem.key_dim * problem.value_dim, 64
    within = chunk * (problem.key_dim + problem.value_dim)
    return problem.heads * (4 * state + 2 * within)


def summed(moves: list[Moves]) -> Moves:
    """Moves added up by their names."""
    total: Moves = {}
    for one in moves:
        for name, moved in one.items():
            total[name] = total.get(name, Moved()) + moved
    return total
