"""What the tests of the DeepSpeed engine run on each rank."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.multirank.engine_cases import (
    OPTIMIZERS,
    Case,
    Trained,
    batch,
    layout_of,
    mesh_of,
    model_of,
    one_step,
    own_part,
    valid_tokens,
)
from xdist.checkpoint.pieces import Piece
from xdist.comm.ledger import ledger
from xdist.errors import PeerLost
from xdist.mesh import Mesh
from xdist.shard import SequenceShard
from xdist.testing import count_c10d_bytes
from xdist.train.engines.build import build_engine
from xdist.train.engines.protocol import Engine

ZERO = "engine.deepspeed.zero_optimization"
# The tests' models are small: without this stage 3 would keep every parameter gathered.
ALL_CUT = f"{ZERO}.stage3_param_persistence_threshold=0"


def settings(stage: int, *more: str) -> tuple[str, ...]:
    """The overrides of a stage; stage 3 cuts every parameter."""
    cut = (ALL_CUT,) if stage == 3 and not any("persistence" in m for m in more) else ()
    return ("engine.name=deepspeed", f"engine.zero_stage={stage}", *cut, *more)


OPTIMIZER, PARAMETERS = "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"
ENGINES = {f"stage {stage}": settings(stage) for stage in range(4)} | {
    "stage 1, state on the host": settings(1, OPTIMIZER),
    "stage 2, state on the host": settings(2, OPTIMIZER),
    "stage 3, state on the host": settings(3, OPTIMIZER),
    "stage 3, all on the host": settings(3, OPTIMIZER, PARAMETERS),
}


class Setting:
    """An engine with what a step of it needs."""

    def __init__(self, case: Case, *, alone: bool = False) -> None:
        self.case, self.config = case, case.config
        self.mesh = mesh_of(case, alone=alone)
        self.layout = layout_of(self.config, self.mesh)
        self.shard = SequenceShard(self.mesh, self.layout)
        self.engine: Engine = build_engine(self.config, model_of(self.config), self.mesh)

    def step(self, number: int) -> float:
        """Forward and backward of all micro-steps."""
        return one_step(self.engine, number, self.mesh, self.layout, self.shard)

    def evaluate(self, number: int) -> float:
        """The loss of one micro-batch, without gradients."""
        tokens, labels = (own_part(p, self.mesh, self.layout) for p in batch(number, 0))
        with torch.no_grad():
            valid = int((batch(number, 0)[1] >= 0).sum())
            return float(self.engine.loss(tokens, labels, self.shard, valid_tokens=valid))

    def pieces(self) -> dict[str, Piece]:
        """Copies of what this rank writes."""
        found = self.engine.pieces()
        return {n: Piece(p.shape, p.start, p.values.detach().clone()) for n, p in found.items()}


def raw_norms(cases: list[Case]) -> list[tuple[float, float]]:
    """Of each engine: the gradient norm as DeepSpeed leaves it, and as the engine gives it."""
    found = []
    for case in cases:
        setting = Setting(case)
        engine: Any = setting.engine
        plain = engine.backward
        engine.backward = lambda loss, engine=engine: engine._engine.backward(
            loss, scale_wrt_gas=False
        )
        setting.step(0)
        raw = engine.finish()
        engine.drop()
        engine.backward = plain
        setting.step(0)
        found.append((raw, engine.finish()))
        engine.drop()
    return found


def with_and_without_a_dropped_step(cases: list[Case]) -> list[list[dict[str, Piece]]]:
    """Four updates; then the same with a step that is dropped, and evaluations, in between."""
    found = []
    for case in cases:
        pair = []
        for disturbed in (False, True):
            setting = Setting(case)
            for number in range(4):
                if disturbed and number == 2:
                    setting.step(7)
                    setting.engine.finish()
                    setting.engine.drop()
                if disturbed:
                    setting.evaluate(number)
                setting.step(number)
                setting.engine.finish()
                setting.engine.update(0.01)
            pair.append(setting.pieces())
        found.append(pair)
    return found


def lose_a_peer(case: Case) -> tuple[int | None, str]:
    """The last rank dies before the backward pass; what the others are told."""
    setting = Setting(case)
    setting.step(0)
    setting.engine.finish()
    setting.engine.update(0.01)
    if setting.mesh.world_rank == setting.mesh.world_size - 1:
        os._exit(9)
    try:
        setting.step(1)
        setting.engine.finish()
        setting.engine.update(0.01)
    except PeerLost as error:
        return error.rank, error.move
    return None, "nothing was noticed"


def groups_made(cases: list[Case]) -> list[int]:
    """Process groups that building and using each engine adds to those of the mesh."""
    found = []
    for case in cases:
        mesh_of(case, alone=False)
        before = len(torch.distributed.distributed_c10d._world.pg_map)
        setting = Setting(case)
        setting.step(0)
        setting.engine.finish()
        setting.engine.update(0.01)
        found.append(len(torch.distributed.distributed_c10d._world.pg_map) - before)
    return found


class Toy(nn.Module):
    """A model with a parameter of odd size, one that some steps leave out, and one of no size."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.inner = nn.Linear(3, 7)
        self.inner.weight.data = torch.randn(7, 3, generator=draw)
        self.inner.bias.data = torch.randn(7, generator=draw)
        self.extra = nn.Parameter(torch.randn(5, generator=draw))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))

    def loss(self, tokens: Tensor, labels: Tensor, shard: Any, *, valid_tokens: int) -> Tensor:
        """A sum over this rank's tokens; a label of 1 also counts `extra`."""
        hidden = self.inner(tokens.float() * self.frozen)
        total = hidden.square().sum() / valid_tokens
        return total + self.extra.square().sum() / valid_tokens if bool(labels.any()) else total


def _toy(case: Case, mesh: Mesh) -> Engine:
    return build_engine(case.config, Toy(), mesh)


def toy_steps(cases: list[Case], alone: bool = False) -> list[Trained]:
    """Steps that use `extra` and steps that do not; tokens are rows of 3 numbers, by rank."""
    found = []
    for case in cases:
        mesh = mesh_of(case, alone=alone)
        engine = _toy(case, mesh)
        trained = Trained()
        for step in range(6):
            draw = torch.Generator().manual_seed(step)
            tokens = torch.randint(1, 5, (4, 3), generator=draw)
            rows = tokens if alone else tokens[mesh.world_rank :: mesh.world_size]
            labels = torch.tensor([step % 3 == 0])
            for half in (rows[:1], rows[1:]):
                loss = engine.loss(half, labels, None, valid_tokens=4)
                engine.backward(loss)
            # Every rank and micro-step adds the term of `extra`.
            trained.norms.append(engine.finish())
            engine.update(0.05)
        found.append(trained)
        copies = {n: Piece(p.shape, p.start, p.values.clone()) for n, p in engine.pieces().items()}
        trained.pieces = copies
    return found


def bad_numbers(cases: list[Case]) -> list[tuple[float, str, str]]:
    """A gradient that is not finite on the last rank alone: norm, who is named, and afterwards."""
    found = []
    for case in cases:
        mesh = mesh_of(case, alone=False)
        engine = _toy(case, mesh)
        tokens = torch.ones(2, 3)
        if mesh.world_rank == mesh.world_size - 1:
            tokens[1, 1] = math.inf
        labels = torch.zeros(1)
        engine.backward(engine.loss(tokens, labels, None, valid_tokens=4))
        norm, named = engine.finish(), engine.bad_parameter()
        engine.drop()
        engine.backward(engine.loss(torch.ones(2, 3), labels, None, valid_tokens=4))
        after = engine.finish()
        engine.update(0.01)
        assert math.isfinite(after), "the dropped step left something behind"
        found.append((norm, named, engine.bad_parameter()))
    return found


class Traffic:
    """Bytes of DeepSpeed alone: of all c10d operations less those of xdist's ledger."""

    def __init__(self, case: Case) -> None:
        self._setting = Setting(case)
        self.micro: list[tuple[int, int]] = []
        self.steps: list[tuple[int, int]] = []

    def measure(self, steps: int) -> dict[str, list[tuple[int, int]]]:
        """(sent, received) of every micro-step, and of every optimizer step."""
        for number in range(steps):
            for micro in range(2):
                self.micro.append(_counted(lambda n=number, m=micro: self._pass(n, m)))
            self.steps.append(_counted(self._step))
        return {"micro": self.micro, "step": self.steps}

    def _pass(self, number: int, micro: int) -> None:
        at = self._setting
        tokens, labels = (own_part(p, at.mesh, at.layout) for p in batch(number, micro))
        valid = valid_tokens(number)
        at.engine.backward(at.engine.loss(tokens, labels, at.shard, valid_tokens=valid))

    def _step(self) -> None:
        self._setting.engine.finish()
        self._setting.engine.update(0.01)


def _counted(act: Callable[[], object]) -> tuple[int, int]:
    with ledger() as own, count_c10d_bytes() as every:
        act()
    return every.sent_bytes - own.sent_bytes, every.received_bytes - own.received_bytes


def moved_bytes(cases: list[Case]) -> list[dict[str, list[tuple[int, int]]]]:
    """`Traffic` of each."""
    return [Traffic(case).measure(3) for case in cases]


def resumed(jobs: list[tuple[Case, dict[str, Tensor], bool]], alone: bool = False) -> list[Trained]:
    """Load whole tensors, tell them again, then three more steps. The last of a job: whether the
    engine has trained before."""
    found = []
    for case, whole, used in jobs:
        setting = Setting(case, alone=alone)
        if used:
            setting.step(9)
            setting.engine.finish()
            setting.engine.update(0.01)
        asked: list[str] = []

        def read(name: str, whole: dict[str, Tensor] = whole, asked: list[str] = asked) -> Tensor:
            asked.append(name)
            return whole[name].clone()

        setting.engine.load(read)
        assert asked == sorted(setting.engine.specs()) == sorted(whole)
        trained = Trained(pieces=setting.pieces())
        for number in range(3, 6):
            trained.losses.append(setting.step(number))
            trained.norms.append(setting.engine.finish())
            setting.engine.update(0.01)
        found.append(trained)
    return found


def first_steps(case: Case, alone: bool = False) -> tuple[dict[str, Piece], list[float]]:
    """What is saved after three steps, and the losses of three more."""
    setting = Setting(case, alone=alone)
    losses, pieces = [], {}
    for number in range(6):
        if number == 3:
            pieces = setting.pieces()
        losses.append(setting.step(number))
        setting.engine.finish()
        setting.engine.update(0.01)
    return pieces, losses[3:]


def losses_on_one_rank() -> list[list[float]]:
    """The losses of six steps of AdamW on one rank, at stage 2 and at stage 3."""
    found = []
    for name in ("stage 2", "stage 3"):
        setting = Setting(Case((1, 1, 1), OPTIMIZERS["adamw"] + ENGINES[name]), alone=True)
        losses = []
        for number in range(6):
            losses.append(setting.step(number))
            setting.engine.finish()
            setting.engine.update(0.01)
        found.append(losses)
    return found
