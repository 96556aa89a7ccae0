"""torch's fully_shard over all data x sequence ranks together.

What is sharded: parameters, gradients and optimizer state, each parameter by rows (its first dim,
in shares of ceil(rows / R); the last ranks may hold fewer, or none). What moves: before a unit
runs, forward and again backward, its parameters are gathered; after its backward its gradients are
reduce-scattered, in every micro-step, so that no more than a unit's gradients are ever whole. A
unit is one of `module.blocks`, or the rest of the model. The bytes are those of `xdist.cost.fsdp`.
What is saved: 1/R of everything, and the whole parameters of the unit at work and of the rest.
What must divide what: nothing; shares are padded to the largest.

Ranks add up the gradients of their own terms, so the reduce-scatter sums and never divides.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from xdist.checkpoint.pieces import Piece, Spec
from xdist.comm.collectives import size_of
from xdist.comm.reduce import start_reduce
from xdist.config import Optimizer
from xdist.cost.fsdp import rows_of_rank
from xdist.errors import ConfigError
from xdist.mesh import Mesh
from xdist.train.engines.fsdp_units import free_all, shard_units
from xdist.train.engines.protocol import Read
from xdist.train.gradients import clip_factor, gradient_norms
from xdist.train.optimizer import build_optimizers, put_state, set_rates, state_tensors


class FsdpEngine:
    """Parameters, gradients and optimizer state in shares of rows; `mesh` has several ranks.

    Raises ConfigError for a model or an optimizer that cannot be cut into rows.
    """

    def __init__(
        self, module: nn.Module, settings: Optimizer, mesh: Mesh, *, reshard: bool = True
    ) -> None:
        if settings.name == "muon":
            raise ConfigError(
                'optimizer.name = "muon" needs whole matrices, and fsdp keeps rows of them',
                "Muon makes a whole matrix orthogonal; a rank holds some of its rows",
                "set engine.name=plain, or optimizer.name=adamw",
            )
        self.module = module
        self._mesh = mesh
        self._clip_norm = settings.clip_norm
        # Before sharding: afterwards a state_dict has shares, and hooks of its own.
        self._model = {n: Spec(tuple(t.shape), t.dtype) for n, t in module.state_dict().items()}
        shard_units(module, mesh, reshard=reshard)
        self._shares = {n: _Share(p, mesh) for n, p in module.named_parameters()}
        by_id = {id(share.parameter): share for share in self._shares.values()}
        # A tied parameter has several names in a checkpoint and one share.
        self._named = {n: by_id[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}
        self._learning = {n: s for n, s in self._shares.items() if s.parameter.requires_grad}
        self._local = {n: s.local for n, s in self._learning.items() if s.local.numel()}
        self._optimizers = build_optimizers(module, settings, self._local)
        self._kept = _kept(settings)
        # Also of parameters of which this rank holds no row.
        self._updates = dict.fromkeys(self._learning, 0) if settings.name == "adamw" else {}
        self._norms: list[tuple[str, Tensor]] = []

    def loss(self, tokens: Tensor, labels: Tensor, shard: Any, *, valid_tokens: int) -> Tensor:
        """`module.loss`, with each unit's parameters gathered while it runs."""
        loss: Tensor = self.module.loss(  # type: ignore[operator]
            tokens, labels, shard, valid_tokens=valid_tokens
        )
        if not torch.is_grad_enabled():
            # What stays gathered for a backward pass waits in vain for one.
            free_all(self.module)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add this micro-step's gradients to the shares: one reduce-scatter a unit."""
        loss.backward()

    @torch.no_grad()
    def finish(self) -> float:
        """Clip by the global norm; one float64 number is summed over the ranks."""
        for share in self._learning.values():
            share.take_gradient()
        held = [(n, s.local.grad) for n, s in self._learning.items() if s.local.grad is not None]
        norms = gradient_norms([gradient for _, gradient in held])
        self._norms = [(name, norm) for (name, _), norm in zip(held, norms, strict=True)]
        own = torch.zeros(1, dtype=torch.float64, device=self._mesh.device)
        for norm in norms:
            own += norm.to(torch.float64) ** 2
        whole = float(start_reduce(own, self._mesh.parameter_group).wait().sqrt())
        factor = clip_factor(whole, self._clip_norm)
        if factor < 1:
            for _, gradient in held:
                gradient.mul_(factor)
        return whole

    def update(self, learning_rate: float) -> None:
        """One step of the optimizer, on this rank's shares."""
        set_rates(self._optimizers, learning_rate)
        for optimizer in self._optimizers:
            optimizer.step()
        for name in self._updates:
            self._updates[name] += 1
        self.drop()

    def drop(self) -> None:
        """Forget the gradients."""
        for share in self._shares.values():
            share.parameter.grad = share.local.grad = None

    def bad_parameter(self) -> str:
        """The first parameter of whose summed gradient this rank's rows were not finite, or "".

        Whose tokens made it so is not known: gradients of ranks are summed before anyone looks.
        """
        return next((name for name, norm in self._norms if not torch.isfinite(norm)), "")

    def specs(self) -> dict[str, Spec]:
        """As the plain engine."""
        found = {f"model/{name}": spec for name, spec in self._model.items()}
        for name, share in self._learning.items():
            for kept in self._kept:
                found[f"optimizer/{kept}/{name}"] = Spec(share.shape, share.local.dtype)
            if name in self._updates:
                found[f"optimizer/updates/{name}"] = Spec((), torch.float32)
        return found

    def pieces(self) -> dict[str, Piece]:
        """The rows this rank holds; rank 0 also what all hold alike (buffers, counts)."""
        found = {f"model/{name}": share.piece(share.local) for name, share in self._named.items()}
        for key, values in state_tensors(self._local, self._optimizers).items():
            kept, _, name = key.partition("/")
            if kept != "updates":
                found[f"optimizer/{key}"] = self._learning[name].piece(values)
        first = self._mesh.world_rank == 0
        # A tensor without elements is written as well, once.
        found = {
            name: piece
            for name, piece in found.items()
            if piece.values.numel() or (first and prod(piece.shape) == 0)
        }
        if first:
            for name, buffer in self._buffers():
                found[name] = Piece(tuple(buffer.shape), 0, buffer.reshape(-1))
            for name, share in self._learning.items():
                if not prod(share.shape):
                    for kept in self._kept:
                        found[f"optimizer/{kept}/{name}"] = share.piece(share.local)
            for name, count in self._updates.items():
                found[f"optimizer/updates/{name}"] = Piece((), 0, torch.tensor([float(count)]))
        return found

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Every rank keeps its own rows of each tensor."""
        free_all(self.module)
        buffers = dict(self._buffers())
        for key in sorted(self.specs()):
            values = read(key)
            room, _, name = key.partition("/")
            if key in buffers:
                buffers[key].copy_(values)
            elif room == "model":
                self._named[name].local.copy_(self._named[name].rows_of(values))
            else:
                self._load_state(name, values)

    def _load_state(self, key: str, values: Tensor) -> None:
        kept, _, name = key.partition("/")
        if kept == "updates":
            self._updates[name] = int(values)
        else:
            values = self._learning[name].rows_of(values)
        if name in self._local:
            put_state(self._local, self._optimizers, key, values)

    def replicated(self) -> Iterable[tuple[str, Tensor]]:
        """Buffers; no two ranks hold the same rows of a parameter."""
        return self._buffers()

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The buffers that a checkpoint holds."""
        found = self.module.named_buffers(remove_duplicate=False)
        return [(f"model/{n}", b.detach()) for n, b in found if n in self._model]


class _Share:
    """This rank's rows of a parameter, as a plain tensor over the storage of torch's sharded one.

    Optimizers work on plain tensors, so that an update is that of the plain engine, bit for bit.
    """

    def __init__(self, parameter: nn.Parameter, mesh: Mesh) -> None:
        self.parameter = parameter
        self.shape = tuple(parameter.shape)
        rows = _local(parameter.detach())
        self.local = nn.Parameter(rows, requires_grad=parameter.requires_grad)
        group = mesh.parameter_group
        first, last = rows_of_rank(self.shape[0], size_of(group), mesh.world_rank)
        assert tuple(rows.shape) == (last - first, *self.shape[1:]), (self.shape, rows.shape)
        self.start = first * prod(self.shape[1:])

    def take_gradient(self) -> None:
        """Give the plain tensor the gradient of the sharded one."""
        gradient = self.parameter.grad
        self.local.grad = None if gradient is None else _local(gradient)

    def rows_of(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor of the whole parameter's shape."""
        flat = whole.reshape(-1)[self.start : self.start + self.local.numel()]
        return flat.view(self.local.shape)

    def piece(self, rows: Tensor) -> Piece:
        """What this rank writes of a tensor that is cut as the parameter is."""
        return Piece(self.shape, self.start, rows.detach().reshape(-1))


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor; a plain one is held whole."""
    rows: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return rows


def _kept(settings: Optimizer) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter, also on a rank that holds none of it."""
    if settings.name == "sgd":
        return ("momentum",) if settings.momentum else ()
    return ("exp_avg", "exp_avg_sq")
