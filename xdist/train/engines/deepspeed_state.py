"""A checkpoint's tensors from the runs that ZeRO leaves on each rank, and back.

Nothing is exchanged to save: what a rank holds of parameters and optimizer state is told as it
lies there, under the names that every engine uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xdist.checkpoint.pieces import Piece, Spec
from xdist.errors import CheckpointError
from xdist.train.engines.deepspeed_stages import Run, Stage
from xdist.train.engines.protocol import Read
from xdist.train.optimizer import kept_by, trained


class State:
    """The tensors of a checkpoint by name. Made before DeepSpeed takes the parameters apart.

    `optimizer` is the one that DeepSpeed steps, over flat parts instead of parameters.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._kept = kept_by(optimizer)
        self._counts = isinstance(optimizer, torch.optim.AdamW)
        # A tied parameter has several names here, and one state.
        self._model: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
        self._trained = trained(module)
        self._specs = {f"model/{n}": _spec(t) for n, t in self._model.items()}
        for name, parameter in self._trained.items():
            for kept in self._kept:
                self._specs[f"optimizer/{kept}/{name}"] = _spec(parameter)
            if self._counts:
                self._specs[f"optimizer/updates/{name}"] = Spec((), torch.float32)

    def specs(self) -> dict[str, Spec]:
        """Whole tensors, equal on all ranks and for all engines."""
        return dict(self._specs)

    def pieces(self, runs: Mapping[int, Run], rank: int) -> dict[str, Piece]:
        """What rank `rank` writes, given what it holds of each parameter."""
        found: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for name, tensor in self._model.items():
            run = runs.get(id(tensor))
            if run is None and rank == 0:  # a buffer, or a parameter without elements
                found[f"model/{name}"] = tensor.detach().reshape(-1)
            elif run is not None and _writes(run, rank):
                found[f"model/{name}"], starts[f"model/{name}"] = run.of(run.flat), run.start
        for name, parameter in self._trained.items():
            run = runs.get(id(parameter))
            for kept in self._kept:
                key = f"optimizer/{kept}/{name}"
                if run is None and rank == 0:
                    found[key] = torch.zeros(0, dtype=parameter.dtype)
                elif run is not None and _writes(run, rank):
                    found[key], starts[key] = self._state(run, kept), run.start
            if self._counts and rank == 0:
                found[f"optimizer/updates/{name}"] = self._updates(run).reshape(1)
        return {
            key: Piece(self._specs[key].shape, starts.get(key, 0), values)
            for key, values in found.items()
        }

    def load(self, read: Read, stage: Stage, runs: Mapping[int, Run]) -> None:
        """Every rank takes its own runs of each tensor."""
        counts: dict[int, tuple[Tensor, str, float]] = {}
        for key in sorted(self._specs):
            values = read(key)
            room, _, name = key.partition("/")
            if room == "model":
                self._load_model(name, values, stage, runs)
                continue
            kept, _, name = name.partition("/")
            run = runs.get(id(self._trained[name]))
            if run is None:
                continue
            if kept == "updates":
                _note(counts, run.flat, name, float(values))
            else:
                state = self._optimizer.state[run.flat]
                if kept not in state:
                    state[kept] = torch.zeros_like(run.flat, requires_grad=False)
                run.put(state[kept], values)
        for flat, _, count in counts.values():
            # The fused update reads it on the device of the flat part.
            self._optimizer.state[flat]["step"] = torch.tensor(count, device=flat.device)
        stage.loaded()

    def replicated(self, *, parameters: bool) -> list[tuple[str, Tensor]]:
        """What all ranks hold alike: buffers, and parameters where they are whole."""
        return [
            (f"model/{name}", tensor.detach())
            for name, tensor in self._model.items()
            if parameters or not isinstance(tensor, nn.Parameter)
        ]

    def _load_model(self, name: str, values: Tensor, stage: Stage, runs: Mapping[int, Run]) -> None:
        tensor = self._model[name]
        run = runs.get(id(tensor))
        if run is None:
            tensor.detach().copy_(values)
        else:
            assert isinstance(tensor, nn.Parameter)
            stage.put(tensor, run, values)

    def _state(self, run: Run, kept: str) -> Tensor:
        state: dict[str, Any] = self._optimizer.state.get(run.flat, {})
        if kept in state:
            return run.of(state[kept])
        return torch.zeros(run.count, dtype=run.flat.dtype)

    def _updates(self, run: Run | None) -> Tensor:
        # All groups are updated together; a parameter without elements counts with them.
        states = self._optimizer.state
        state = states.get(run.flat, {}) if run else next(iter(states.values()), {})
        updates: Tensor = state.get("step", torch.zeros((), dtype=torch.float32))
        return updates.detach().cpu()


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype)


def _writes(run: Run, rank: int) -> bool:
    return run.count > 0 and (rank == 0 or not run.alike)


def _note(
    counts: dict[int, tuple[Tensor, str, float]], flat: Tensor, name: str, count: float
) -> None:
    """Remember the count of updates of a flat part; its parameters must agree."""
    _, first, before = counts.setdefault(id(flat), (flat, name, count))
    if before != count:
        raise CheckpointError(
            "the checkpoint's parameters were not updated equally often",
            f"{first} {before:.0f} times, {name} {count:.0f} times; DeepSpeed keeps one count "
            "for both",
            "resume with the engine that wrote it, or with engine.name=plain",
        )
