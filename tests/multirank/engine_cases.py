"""What the parity tests of engines run on each rank: 20 steps by hand, and the state afterwards.

The reference is the plain engine on one rank with the whole batch. Micro-steps have different
numbers of valid tokens, rows too, and the last quarter of a sequence has none in some of them, so
that a sequence rank may have no term of the loss at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xdist.checkpoint.pieces import Piece
from xdist.config import Config, override, parse
from xdist.layout import Layout
from xdist.mesh import Mesh, init_mesh
from xdist.models import build
from xdist.shard import SequenceShard
from xdist.train.engines.build import build_engine
from xdist.train.engines.protocol import Engine

MICRO_STEPS, ROWS, TOKENS, VOCAB = 2, 2, 41, 29

TEXT = """
[model]
dim = 16
head_dim = 8
pattern = "linear,attention"
window = 9
vocab_size = 29
ngram_orders = []
[train]
accumulation = 2
tile_tokens = 48
[optimizer]
warmup_steps = 0
schedule = "constant"
clip_norm = 0.5
"""

OPTIMIZERS = {
    "sgd": ("optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.learning_rate=0.05"),
    "adamw": ("optimizer.name=adamw", "optimizer.learning_rate=0.01", "optimizer.eps=1e-4"),
}

# What is compared with the plain engine on one rank, by name: settings of [engine].
ENGINES = {
    "plain": (),
    "fsdp": ("engine.name=fsdp",),
    "fsdp kept whole": ("engine.name=fsdp", "engine.reshard=false"),
}


@dataclass(frozen=True)
class Case:
    """One run: degrees (data, ring, ulysses), settings of the engine and of the optimizer."""

    degrees: tuple[int, int, int]
    settings: tuple[str, ...] = ()
    steps: int = 20

    @property
    def config(self) -> Config:
        """The whole config."""
        data, ring, ulysses = self.degrees
        degrees = [f"parallel.data={data}", f"parallel.ring={ring}", f"parallel.ulysses={ulysses}"]
        layout = ["parallel.layout=zigzag"] if ring > 1 else []
        return override(parse(TEXT, "engines.toml"), [*degrees, *layout, *self.settings])


@dataclass
class Trained:
    """What a rank has to show: losses, norms before clipping, its pieces of the state."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    pieces: dict[str, Piece] = field(default_factory=dict)


def batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [ROWS, TOKENS] of the whole global micro-batch; some labels are -100."""
    draw = torch.Generator().manual_seed(1000 * (step % 3) + micro)
    text = torch.randint(VOCAB, (ROWS, TOKENS + 1), generator=draw)
    tokens, labels = text[:, :-1].clone(), text[:, 1:].clone()
    labels[torch.rand(ROWS, TOKENS, generator=draw) < 0.2] = -100
    labels[0, : 5 + 7 * micro] = -100
    if (step + micro) % 3 == 0:
        labels[:, 3 * TOKENS // 4 :] = -100
    if step % 4 == 1:
        labels[1, 2:] = -100
    return tokens, labels


def valid_tokens(step: int) -> int:
    """Labels that count in all micro-batches of a step."""
    return sum(int((batch(step, micro)[1] >= 0).sum()) for micro in range(MICRO_STEPS))


def own_part(whole: Tensor, mesh: Mesh, layout: Layout) -> Tensor:
    """This rank's rows and positions of a global batch."""
    each = whole.shape[0] // mesh.data_size
    rows = whole[mesh.data_rank * each : (mesh.data_rank + 1) * each]
    return torch.cat([rows[:, a:b] for a, b in layout.segments(mesh.sequence_rank)], 1)


def layout_of(config: Config, mesh: Mesh) -> Layout:
    """The layout that the config names."""
    zigzag = config.parallel.layout == "zigzag"
    return (Layout.zigzag if zigzag else Layout.contiguous)(TOKENS, mesh.sequence_size)


def mesh_of(case: Case, *, alone: bool) -> Mesh:
    """The ranks of the pool, or this process alone."""
    data, ring, ulysses = case.degrees
    if alone:
        return Mesh.one_rank("cpu")
    return init_mesh(data=data, ring=ring, ulysses=ulysses, device="cpu")


def model_of(config: Config) -> nn.Module:
    """The model, the same on every rank."""
    return build(
        config.model, precision=config.train.precision, tile_tokens=config.train.tile_tokens, seed=3
    )


def one_step(engine: Engine, step: int, mesh: Mesh, layout: Layout, shard: Any) -> float:
    """Forward and backward of all micro-steps; the loss of the global batch."""
    valid, total = valid_tokens(step), 0.0
    for micro in range(MICRO_STEPS):
        tokens, labels = (own_part(part, mesh, layout) for part in batch(step, micro))
        loss = engine.loss(tokens, labels, shard, valid_tokens=valid)
        engine.backward(loss)
        total += float(loss.detach())
    return total


def train(case: Case, alone: bool = False) -> Trained:
    """Train as this rank; `alone`: the whole batch in this process."""
    config = case.config
    mesh = mesh_of(case, alone=alone)
    layout = layout_of(config, mesh)
    shard = SequenceShard(mesh, layout)
    engine = build_engine(config, model_of(config), mesh)
    trained = Trained()
    for step in range(case.steps):
        trained.losses.append(one_step(engine, step, mesh, layout, shard))
        trained.norms.append(engine.finish())
        engine.update(config.optimizer.learning_rate)
    trained.pieces = {name: _copied(piece) for name, piece in engine.pieces().items()}
    return trained


def train_all(cases: list[Case]) -> list[Trained]:
    """Several runs, one after another."""
    return [train(case) for case in cases]


def whole_tensors(ranks: list[dict[str, Piece]]) -> dict[str, Tensor]:
    """The whole tensors that the pieces of all ranks make; each element exactly once."""
    found: dict[str, Tensor] = {}
    for name in sorted({name for pieces in ranks for name in pieces}):
        held = [pieces[name] for pieces in ranks if name in pieces]
        shape, dtype = held[0].shape, held[0].values.dtype
        flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
        times = torch.zeros(flat.shape, dtype=torch.int64)
        for piece in held:
            assert piece.shape == shape, name
            assert piece.values.ndim == 1, name
            stop = piece.start + piece.values.numel()
            flat[piece.start : stop] = piece.values
            times[piece.start : stop] += 1
        assert times.eq(1).all(), f"{name}: elements written {times.min()} to {times.max()} times"
        found[name] = flat.view(shape)
    return found


def _copied(piece: Piece) -> Piece:
    return Piece(piece.shape, piece.start, piece.values.detach().clone())
