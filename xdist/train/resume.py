"""Saving a run's state and taking it up again, on the same ranks or on others."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple, cast

from torch import Tensor

from xdist.checkpoint import Checkpoint, Spec, clean_stale, open_latest
from xdist.checkpoint.manifest import MAX_JSON_BYTES
from xdist.config import Config
from xdist.data import require_same_data
from xdist.errors import ConfigError
from xdist.mesh import Mesh
from xdist.train.agree import share_json, share_tensor, together
from xdist.train.engines.protocol import Engine, Read
from xdist.train.optimizer import check_same_names
from xdist.train.record import Record

# In the state of a checkpoint that holds parameters alone: `xdist checkpoint import` writes it.
IMPORTED = "imported"


@dataclasses.dataclass
class Position:
    """How far a run is: all that decides what the next step does, but for the tensors."""

    step: int = 0  # optimizer steps made, skipped ones included
    sample_cursor: int = 0  # samples used up, over all ranks
    skipped_in_row: int = 0  # steps left out for values that were not finite, just now
    bad_samples: int = 0  # samples dropped for damaged data, in the whole run
    stage_first: int = 0  # the cursor from which the stage of `step` counts its epochs

    def copy(self) -> Position:
        """For a thread that reads ahead while the loop goes on with its own."""
        return dataclasses.replace(self)

    def made_step(self, config: Config, samples: int) -> None:
        """One more step, of so many samples."""
        stage = stage_of(config, self.step)
        self.step += 1
        self.sample_cursor += samples
        if stage_of(config, self.step) != stage:
            self.stage_first = self.sample_cursor


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


def state_of(
    config: Config, mesh: Mesh, position: Position, identity: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says besides its tensors: JSON."""
    return {
        **dataclasses.asdict(position),
        "stage": stage_of(config, position.step),
        "degrees": degrees(mesh),
        "global_batch": global_batch(config, position.step),
        "config": config.model_dump(mode="json"),
        "data": identity,
    }


def resume(
    record: Record, config: Config, mesh: Mesh, engine: Engine, identity: dict[str, Any]
) -> tuple[Position, list[str]]:
    """Take up the newest good checkpoint; return where the run is, and lines that say so.

    Rank 0 hashes every file, then reads tensor by tensor and shares each: all ranks start from the
    same bytes, and no rank holds more than one whole tensor besides its engine's own. Raises
    CheckpointError (4), DataError (5, another data set), ConfigError (2, another data order).
    """
    found = together(mesh, lambda: _find(record, config, engine, identity, mesh))
    head = found and {"state": found.state, "path": str(found.path), "lines": found.lines()}
    head = cast("dict[str, Any] | None", share_json(head, mesh))
    if head is None:
        return Position(), ["fresh start: no checkpoint in " + str(record.checkpoints)]
    engine.load(_reader(found, engine.specs(), mesh))
    record.last_checkpoint = head["path"]
    state = head["state"]
    if IMPORTED in state:
        return Position(), [*head["lines"], f"starting from parameters of {state[IMPORTED]}"]
    return position_of(state, config), [*head["lines"], told(state, config, mesh)]


def _reader(found: Checkpoint | None, specs: dict[str, Spec], mesh: Mesh) -> Read:
    """`read(name)` of `engine.load`, a collective call: rank 0's tensor on every rank."""

    def mine(name: str) -> Tensor | None:
        if found is None:
            return None
        spec = specs[name]
        if name not in found.specs:
            # Parameters alone were imported: the optimizer starts with its first state.
            return spec.zeros()
        return found.read(name).to(spec.dtype)

    def read(name: str) -> Tensor:
        held = together(mesh, lambda: mine(name))
        return share_tensor(held, specs[name].shape, specs[name].dtype, mesh)

    return read


def told(state: dict[str, Any], config: Config, mesh: Mesh) -> str:
    """The line of a resume: what changed, and what did not."""
    old, new = state["degrees"], degrees(mesh)

    def change(name: str) -> str:
        return f"{old[name]}->{new[name]}" if old[name] != new[name] else f"{new[name]}"

    had, has = state["global_batch"], global_batch(config, state["step"])
    why = "as the next stage says" if _same_order(state, config) else "allowed by the config"
    batch = f"unchanged {has}" if had == has else f"{had}->{has}, {why}"
    sequence_old, sequence_new = old["ring"] * old["ulysses"], new["ring"] * new["ulysses"]
    sequence = f"{sequence_old}->{sequence_new}" if sequence_old != sequence_new else sequence_new
    before, now = state["config"].get("engine", {}).get("name", "plain"), config.engine.name
    engine = f"engine {before}->{now}, " if before != now else ""
    return (
        f"resumed {change('ranks')} ranks, sequence ranks {sequence}, data {change('data')}, "
        f"{engine}global batch {batch}, step {state['step']}, "
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


def _find(
    record: Record, config: Config, engine: Engine, identity: dict[str, Any], mesh: Mesh
) -> Checkpoint | None:
    wanted = engine.specs()
    if mesh.world_rank != 0:
        return None
    clean_stale(record.checkpoints)
    held = sum(spec.count * spec.dtype.itemsize for spec in wanted.values())
    found = open_latest(
        record.checkpoints,
        resume=config.checkpoint.resume,
        # Twice, so that a model of another dtype is told as such, and room for state and headers.
        max_bytes=2 * held + MAX_JSON_BYTES,
    )
    if found is None:
        return None
    if IMPORTED in found.state:
        parameters = {name: spec for name, spec in wanted.items() if name.startswith("model/")}
        # Weights of another precision are taken over in this run's.
        given = {name: Spec(s.shape, wanted.get(name, s).dtype) for name, s in found.specs.items()}
        check_same_names(parameters, given, "parameters")
        return found
    check_same_names(wanted, found.specs, "state")
    check_order(found.state, config)
    changed = require_same_data(
        found.state["data"], identity, allow_change=config.data.allow_fingerprint_change
    )
    return dataclasses.replace(found, rejected=(*found.rejected, *changed))


def check_order(state: dict[str, Any], config: Config) -> None:
    """The samples used so far must be those this config would have used.

    With checkpoint.allow_batch_change only the seed must be the same, and a step be left.
    """
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
    if config.checkpoint.allow_batch_change or _same_order(state, config):
        return
    raise ConfigError(
        "the global batch changed since the checkpoint",
        f"at step {step} it was {state['global_batch']} samples with {cursor} used so far, "
        f"now it is {global_batch(config, step)} with {samples_before(config, step)}",
        "keep batch x accumulation of each stage (accumulation may trade against batch), "
        "or start in another run directory; checkpoint.allow_batch_change=true goes on from the "
        "next unused sample",
    )


def position_of(state: dict[str, Any], config: Config) -> Position:
    """Where a run with `config` goes on: after the step and the samples of the checkpoint.

    A stage that goes on counts its epochs from where it began, whatever the batch was until then.
    """
    fields = [field.name for field in dataclasses.fields(Position)]
    position = Position(**{name: state[name] for name in fields if name in state})
    index = stage_of(config, position.step)
    begins = sum(stage.steps for stage in config.train.curriculum[:index])
    old = _stages(state["config"]["train"])
    old_index, old_begins = _place(old, position.step)
    before, now = old[old_index], config.train.curriculum[index]
    same_samples = (before.length, before.crop) == (now.length, now.crop)
    if position.step == begins or not same_samples:
        position.stage_first = position.sample_cursor
    elif _same_order(state, config) and _shift(state) == 0:
        position.stage_first = samples_before(config, begins)
    elif "stage_first" not in state:
        position.stage_first = _samples(old, old_begins)
    return position


class _Stage(NamedTuple):
    """A stage of the curriculum as a checkpoint's config spells it."""

    length: int
    crop: tuple[int, ...]
    samples: int  # of one step
    steps: int


def _stages(train: dict[str, Any]) -> list[_Stage]:
    each = train["accumulation"]
    return [
        _Stage(s["length"], tuple(s.get("crop", ())), s["batch"] * each, s["steps"])
        for s in train["curriculum"]
    ]


def _samples(stages: list[_Stage], step: int) -> int:
    """Samples that the stages use up before `step`."""
    used = 0
    for stage in stages:
        made = min(step, stage.steps)
        used, step = used + made * stage.samples, step - made
    return used


def _place(stages: list[_Stage], step: int) -> tuple[int, int]:
    """The index of the stage that `step` belongs to, and its first step."""
    begins = 0
    for index, stage in enumerate(stages):
        if step < begins + stage.steps or index == len(stages) - 1:
            return index, begins
        begins += stage.steps
    raise AssertionError("a curriculum has a stage")


def _shift(state: dict[str, Any]) -> int:
    """Samples used beyond those of the checkpoint's own curriculum: 0 until a change of batch."""
    used: int = state["sample_cursor"]
    return used - _samples(_stages(state["config"]["train"]), state["step"])


def _same_order(state: dict[str, Any], config: Config) -> bool:
    """Whether `config` would have used the samples that the checkpoint's run used.

    The batch is that of the stage under way; a stage that is still to begin may have any.
    """
    step, cursor = state["step"], state["sample_cursor"]
    ends = itertools.accumulate(stage.steps for stage in config.train.curriculum)
    same_batch = step in ends or global_batch(config, step) == state["global_batch"]
    return same_batch and samples_before(config, step) + _shift(state) == cursor


def global_batch(config: Config, step: int) -> int:
    """Samples of optimizer step `step`, over all ranks."""
    stage = config.train.curriculum[stage_of(config, step)]
    return stage.batch * config.train.accumulation
