"""Saving a run's state and taking it up again, on the same ranks or on others."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, cast

import torch
from torch import Tensor

from xdist.checkpoint import Loaded, Outcome, Saver, clean_stale, load_latest
from xdist.checkpoint.manifest import MAX_JSON_BYTES
from xdist.config import Config
from xdist.data import require_same_data
from xdist.errors import ConfigError
from xdist.mesh import Mesh
from xdist.train.agree import share_json, share_tensor, together
from xdist.train.engines.protocol import Engine
from xdist.train.optimizer import check_same_names
from xdist.train.record import Record


@dataclasses.dataclass
class Position:
    """How far a run is: all that decides what the next step does, but for the tensors."""

    step: int = 0  # optimizer steps made, skipped ones included
    sample_cursor: int = 0  # samples used up, over all ranks
    skipped_in_row: int = 0  # steps left out for values that were not finite, just now
    bad_samples: int = 0  # samples dropped for damaged data, in the whole run


def stage_of(config: Config, step: int) -> int:
    """The index of the stage that optimizer step `step` (0 is the first) belongs to."""
    end = 0
    for index, stage in enumerate(config.train.curriculum):
        end += stage.steps
        if step < end:
            return index
    return len(config.train.curriculum) - 1


def samples_before(config: Config, step: int) -> int:
    """Samples that the curriculum uses up before optimizer step `step`, over all ranks."""
    left, samples = step, 0
    for stage in config.train.curriculum:
        made = min(left, stage.steps)
        samples += made * stage.batch * config.train.accumulation
        left -= made
    return samples


def save_state(
    saver: Saver,
    config: Config,
    mesh: Mesh,
    engine: Engine,
    position: Position,
    identity: dict[str, Any],
) -> Outcome:
    """Write a checkpoint from rank 0; every rank returns, with the same outcome, when it is done.

    One failed save is an outcome that is not `ok`: the run goes on. Raises, the same on all ranks,
    NumericsError when a tensor is not finite and CheckpointError when two saves in a row failed.
    """
    state = {
        **dataclasses.asdict(position),
        "stage": stage_of(config, position.step),
        "degrees": degrees(mesh),
        "global_batch": _global_batch(config, position.step),
        "config": config.model_dump(mode="json"),
        "data": identity,
    }
    outcome: Outcome | None = None

    def write() -> None:
        nonlocal outcome
        if mesh.world_rank == 0:
            held = {n: p.values.view(p.shape) for n, p in engine.pieces().items()}
            outcome = saver.save(position.step, held, state)
            if outcome.fatal and outcome.error is not None:
                raise outcome.error

    together(mesh, write)
    told = outcome and {"ok": outcome.ok, "path": str(outcome.path or ""), "text": outcome.text}
    values = cast("dict[str, Any]", share_json(told, mesh))
    path = pathlib.Path(values["path"]) if values["path"] else None
    return Outcome(values["ok"], path=path, text=values["text"])


def resume(
    record: Record, config: Config, mesh: Mesh, engine: Engine, identity: dict[str, Any]
) -> tuple[Position, list[str]]:
    """Take up the newest good checkpoint; return where the run is, and lines that say so.

    Rank 0 reads and checks, the others receive: all ranks start from the same bytes. Raises
    CheckpointError (4), DataError (5, another data set), ConfigError (2, another data order).
    """
    loaded = together(mesh, lambda: _read(record, config, engine, identity, mesh))
    head = loaded and {"state": loaded.state, "path": str(loaded.path), "lines": loaded.lines()}
    head = cast("dict[str, Any] | None", share_json(head, mesh))
    if head is None:
        return Position(), ["fresh start: no checkpoint in " + str(record.checkpoints)]
    specs = engine.specs()

    def read(name: str) -> Tensor:
        spec = specs[name]
        mine = loaded.tensors[name] if loaded else torch.empty(spec.shape, dtype=spec.dtype)
        return share_tensor(mine.to(mesh.device), mesh).cpu()

    engine.load(read)
    record.last_checkpoint = head["path"]
    state = head["state"]
    fields = [field.name for field in dataclasses.fields(Position)]
    return Position(**{name: state[name] for name in fields}), [
        *head["lines"],
        told(state, config, mesh),
    ]


def told(state: dict[str, Any], config: Config, mesh: Mesh) -> str:
    """The line of a resume: what changed, and what did not."""
    old, new = state["degrees"], degrees(mesh)

    def change(name: str) -> str:
        return f"{old[name]}->{new[name]}" if old[name] != new[name] else f"{new[name]}"

    sequence_old, sequence_new = old["ring"] * old["ulysses"], new["ring"] * new["ulysses"]
    sequence = f"{sequence_old}->{sequence_new}" if sequence_old != sequence_new else sequence_new
    return (
        f"resumed {change('ranks')} ranks, sequence ranks {sequence}, data {change('data')}, "
        f"global batch unchanged {state['global_batch']}, step {state['step']}, "
        f"data cursor {state['sample_cursor']} samples, no random state to restore"
    )


def degrees(mesh: Mesh) -> dict[str, int]:
    """The degrees a checkpoint was written under; it loads under any others."""
    return {
        "ranks": mesh.world_size,
        "data": mesh.data_size,
        "ring": mesh.ring_size,
        "ulysses": mesh.ulysses_size,
    }


def _read(
    record: Record, config: Config, engine: Engine, identity: dict[str, Any], mesh: Mesh
) -> Loaded | None:
    if mesh.world_rank != 0:
        return None
    clean_stale(record.checkpoints)
    wanted = engine.specs()
    held = sum(spec.count * spec.dtype.itemsize for spec in wanted.values())
    loaded = load_latest(
        record.checkpoints,
        resume=config.checkpoint.resume,
        # Twice, so that a model of another dtype is told as such, and room for state and headers.
        max_bytes=2 * held + MAX_JSON_BYTES,
    )
    if loaded is None:
        return None
    check_same_names(wanted, loaded.tensors, "state")
    _check_order(loaded.state, config)
    changed = require_same_data(
        loaded.state["data"], identity, allow_change=config.data.allow_fingerprint_change
    )
    return dataclasses.replace(loaded, rejected=(*loaded.rejected, *changed))


def _check_order(state: dict[str, Any], config: Config) -> None:
    """The samples used so far must be those this config would have used."""
    seed = state["config"]["run"]["seed"]
    if seed != config.run.seed:
        raise ConfigError(
            "the seed changed since the checkpoint",
            f"run.seed was {seed} and is {config.run.seed}: the data order would start anew",
            f"set run.seed={seed}, or start in another run directory",
        )
    step, cursor = state["step"], state["sample_cursor"]
    if step > config.train.total_steps:
        raise ConfigError(
            "the checkpoint is beyond the end of the curriculum",
            f"it has {step} steps, train.curriculum has {config.train.total_steps}",
            "lengthen the curriculum, or start in another run directory",
        )
    batch, expected = _global_batch(config, step), samples_before(config, step)
    if batch != state["global_batch"] or expected != cursor:
        raise ConfigError(
            "the global batch changed since the checkpoint",
            f"at step {step} it was {state['global_batch']} samples with {cursor} used so far, "
            f"now it is {batch} with {expected}",
            "keep batch x accumulation of each stage (accumulation may trade against batch), "
            "or start in another run directory",
        )


def _global_batch(config: Config, step: int) -> int:
    stage = config.train.curriculum[stage_of(config, step)]
    return stage.batch * config.train.accumulation
