"""What the tests of the fsdp engine run on each rank."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from tests.multirank.engine_cases import Case, layout_of, mesh_of, model_of, one_step, own_part
from tests.multirank.engine_cases import batch as batch_of
from xdist.checkpoint.pieces import Piece, Spec
from xdist.comm.ledger import ledger
from xdist.config import Optimizer
from xdist.cost.fsdp import Held
from xdist.errors import PeerLost
from xdist.mesh import Mesh, init_mesh
from xdist.shard import SequenceShard
from xdist.testing import count_c10d_bytes
from xdist.train.engines.build import build_engine
from xdist.train.engines.fsdp import FsdpEngine
from xdist.train.engines.fsdp_units import units_of
from xdist.train.engines.plain import PlainEngine
from xdist.train.engines.protocol import Engine

SGD = Optimizer(name="sgd", momentum=0.5, learning_rate=0.1, clip_norm=0.7)


class Layer(nn.Module):
    """A matrix of `rows` rows, and one that only rank 1 uses."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-1, 1, rows * 3).reshape(rows, 3))
        self.one = nn.Parameter(torch.linspace(0, 1, 5))
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x: Tensor, rank: int) -> Tensor:
        y = (x @ self.matrix.t()).tanh() @ self.matrix * self.scale
        return y + self.one.sum() ** 3 / 9 if rank == 1 else y


class Odd(nn.Module):
    """Rows that no number of ranks divides, tied, frozen, empty and unused parameters, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(7), Layer(2)])
        self.head = nn.Parameter(torch.linspace(0, 2, 15).reshape(5, 3))
        self.tied = self.head
        self.nobody = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    @property
    def blocks(self) -> list[nn.Module]:
        """What is gathered and freed one by one."""
        return list(self.layers)

    def loss(self, tokens: Tensor, labels: Tensor, shard: int, *, valid_tokens: int) -> Tensor:
        """Rank `shard`'s terms; every rank sees them as the whole loss."""
        x = torch.sin(tokens.to(self.head.dtype) + shard)
        for layer in self.layers:
            x = layer(x, shard)
        return ((x * self.frozen) @ self.head.t()).pow(2).sum() / valid_tokens + self.tied.sum()


def held_of(module: nn.Module) -> tuple[list[list[Held]], list[Held]]:
    """The blocks and the rest as the formulas take them; before the engine cuts the parameters."""
    blocks, rest = units_of(module)

    def held(parameter: nn.Parameter) -> Held:
        return Held(tuple(parameter.shape), parameter.requires_grad, parameter.element_size())

    return [[held(p) for p in b.parameters()] for b in blocks], [held(p) for _, p in rest]


def _engine(module: nn.Module, mesh: Mesh, *, plain: bool, reshard: bool) -> Engine:
    if plain:
        return PlainEngine(module, SGD, mesh)
    return FsdpEngine(module, SGD, mesh, reshard=reshard)


def _step(engine: Engine, mesh: Mesh, factor: float = 1.0) -> float:
    """Two micro-steps; the norm."""
    for micro in range(2):
        tokens = torch.arange(6).reshape(2, 3) + micro
        loss = engine.loss(tokens, tokens, mesh.world_rank, valid_tokens=4)
        engine.backward(loss * factor)
    return engine.finish()


def odd_parameters(plain: bool, reshard: bool = True) -> tuple[dict[str, Piece], list[float]]:
    """Three updates; one step of NaN is dropped in between."""
    mesh = init_mesh(device="cpu")
    engine = _engine(Odd(), mesh, plain=plain, reshard=reshard)
    norms = []
    for factor in (1.0, 1.0, float("nan"), 1.0):
        norms.append(_step(engine, mesh, factor))
        if factor == 1.0:
            assert engine.bad_parameter() == ""
            engine.update(0.1)
        else:
            # With few rows a rank may hold none of a parameter, but some of another.
            assert engine.bad_parameter() in dict(Odd().named_parameters())
            engine.drop()
        assert all(p.grad is None for p in engine.module.parameters())
    return {n: Piece(p.shape, p.start, p.values.clone()) for n, p in engine.pieces().items()}, norms


def freed_in_forward(reshard: bool) -> list[tuple[bool, int]]:
    """While the second block runs: whether the first one's parameters are shares again; and the
    elements this rank holds between steps."""
    mesh = init_mesh(device="cpu")
    module = Odd()
    seen = []

    def look(*_: Any) -> None:
        seen.append(hasattr(module.layers[0].matrix, "to_local"))

    module.layers[1].register_forward_pre_hook(look)
    engine = FsdpEngine(module, SGD, mesh, reshard=reshard)
    _step(engine, mesh)
    engine.update(0.1)
    held = sum(p.values.numel() for n, p in engine.pieces().items() if n.startswith("model/layers"))
    return [(shares, held) for shares in seen]


def rank_1_dies() -> tuple[str, str]:
    """Rank 1 leaves in its second micro-step; the error of the others."""
    mesh = init_mesh(device="cpu")
    engine = FsdpEngine(Odd(), SGD, mesh)
    tokens = torch.arange(6).reshape(2, 3)
    engine.backward(engine.loss(tokens, tokens, mesh.world_rank, valid_tokens=4))
    loss = engine.loss(tokens, tokens, mesh.world_rank, valid_tokens=4)
    if mesh.world_rank == 1:
        os._exit(9)
    try:
        engine.backward(loss)
    except PeerLost as error:
        return error.what, error.why
    return "", "no error"


def bytes_of_odd(reshard: bool) -> dict[str, Any]:
    """One micro-step, then one evaluation, of a model that moves nothing itself."""
    mesh = init_mesh(device="cpu")
    module = Odd()
    held = held_of(module)
    engine = FsdpEngine(module, SGD, mesh, reshard=reshard)
    tokens = torch.arange(6).reshape(2, 3)
    with ledger() as moved, count_c10d_bytes() as counted:
        engine.backward(engine.loss(tokens, tokens, mesh.world_rank, valid_tokens=4))
    with ledger() as evaluated, count_c10d_bytes() as eval_counted, torch.no_grad():
        engine.loss(tokens, tokens, mesh.world_rank, valid_tokens=4)
    free = all(hasattr(p, "to_local") for p in module.parameters() if p.numel())
    with ledger() as clipped:
        engine.finish()
    return {
        "held": held,
        "train": [
            (moved.sent_bytes, moved.received_bytes),
            (counted.sent_bytes, counted.received_bytes),
        ],
        "evaluate": [
            (evaluated.sent_bytes, evaluated.received_bytes),
            (eval_counted.sent_bytes, eval_counted.received_bytes),
        ],
        "moves": set(moved.by_move),
        "clip": (set(clipped.by_move), clipped.sent_bytes),
        "free": free,
    }


def bytes_of_model(case: Case) -> dict[str, Any]:
    """One micro-step of the streamed model, whose own moves stand in the ledger too."""
    config = case.config
    mesh = mesh_of(case, alone=False)
    layout = layout_of(config, mesh)
    shard = SequenceShard(mesh, layout)
    module = model_of(config)
    held = held_of(module)
    engine = build_engine(config, module, mesh)
    tokens, labels = (own_part(part, mesh, layout) for part in batch_of(0, 0))
    with ledger() as moved, count_c10d_bytes() as counted:
        engine.backward(engine.loss(tokens, labels, shard, valid_tokens=9))
    moves = moved.by_move
    return {
        "held": held,
        "all": (moved.sent_bytes, counted.sent_bytes),
        "fsdp": sum(moves[m].sent_bytes for m in moves if m.startswith("fsdp")),
        "calls": {m: moves[m].calls for m in moves if m.startswith("fsdp")},
    }


def carried_over(case: Case) -> list[bool]:
    """Two steps, then the state to a new fsdp engine: equal to the bit, and so is the next step."""
    config = case.config
    mesh = mesh_of(case, alone=False)
    layout = layout_of(config, mesh)
    shard = SequenceShard(mesh, layout)
    first = build_engine(config, model_of(config), mesh)
    for step in range(2):
        one_step(first, step, mesh, layout, shard)
        first.finish()
        first.update(0.01)
    whole = gathered(first.pieces(), first.specs(), mesh)
    other = build_engine(config, model_of(config), mesh)
    names: list[str] = []

    def read(name: str) -> Tensor:
        names.append(name)
        return whole[name]

    other.load(read)
    alone = PlainEngine(model_of(config), config.optimizer, Mesh.one_rank("cpu"))
    alone.load(whole.__getitem__)
    back = alone.pieces()
    same = [
        names == sorted(first.specs()),
        other.specs() == first.specs() == alone.specs(),
        set(back) == set(whole),
        all(torch.equal(back[n].values, whole[n].reshape(-1)) for n in whole),
        _equal(first.pieces(), other.pieces()),
    ]
    losses = [one_step(engine, 2, mesh, layout, shard) for engine in (first, other)]
    norms = [engine.finish() for engine in (first, other)]
    for engine in (first, other):
        engine.update(0.01)
    return [
        *same,
        losses[0] == losses[1],
        norms[0] == norms[1],
        _equal(first.pieces(), other.pieces()),
    ]


def gathered(pieces: dict[str, Piece], specs: dict[str, Spec], mesh: Mesh) -> dict[str, Tensor]:
    """Every rank's pieces put together, on every rank."""
    from xdist.comm.reduce import start_reduce

    whole = {}
    for name, spec in sorted(specs.items()):
        flat = torch.zeros(spec.count, dtype=spec.dtype)
        if name in pieces:
            piece = pieces[name]
            flat[piece.start : piece.start + piece.values.numel()] = piece.values
        # Every element comes from one rank, and zeros from the others: the sum is that element.
        whole[name] = start_reduce(flat, mesh.parameter_group).wait().view(spec.shape)
    return whole


def _equal(a: dict[str, Piece], b: dict[str, Piece]) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].shape, a[n].start) == (b[n].shape, b[n].start)
        and torch.equal(a[n].values, b[n].values)
        for n in a
    )
