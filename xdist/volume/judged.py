"""Which runs may be judged: finished ones, of one store and slab, under names of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from xdist.checkpoint.read import Checkpoint, open_latest
from xdist.config import Config
from xdist.data import Degradation, GridStore
from xdist.data.identity import differences
from xdist.errors import CheckpointError, ConfigError, DataError
from xdist.train.record import CHECKPOINTS, STATUS, read_json


def check_together(runs: Sequence[Path], configs: Sequence[Config]) -> None:
    """Whether the runs can stand in one table, and their label maps in one folder.

    Raises:
        ConfigError: runs of different data or of equal names, or without a slab.
    """
    if any(one.data != configs[0].data for one in configs) or not configs[0].data.slab:
        raise ConfigError(
            "runs can be judged beside each other on one volume and slab",
            f"{', '.join(map(str, runs))} differ in [data], or hold out no slab",
            "train them with the same [data], and data.slab set",
        )
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            "runs of equal names would write the same files",
            f"{', '.join(twice)}: {', '.join(str(r) for r in runs if r.name in twice)}",
            "name each run once, and give the folders different names",
        )


def final_checkpoint(run: Path, config: Config) -> Checkpoint:
    """The checkpoint that a finished run ended with, of the store as it is now.

    Raises:
        CheckpointError: the run has not finished, or its last checkpoint is missing or damaged.
        DataError: the store is not the one that the run was trained on.
    """
    status = _status(run)
    state, step = status.get("state", "unknown"), status.get("step", 0)
    again = f"finish it with `xdist launch local {run / 'config.toml'}`, then judge"
    if state != "finished":
        raise CheckpointError(
            f"{run} has not finished", f"{STATUS} says {state!r} at step {step}", again
        )
    found = open_latest(run / CHECKPOINTS)
    if found is None or found.step != step:
        whole = ["there is none"] if found is None else [f"the newest whole one is {found.step}"]
        there = "; ".join([*whole, *(found.rejected if found else ())])
        raise CheckpointError(
            f"no checkpoint of the last step of {run}", f"it ended at step {step}; {there}", again
        )
    trained, now = found.state["data"], store_of(config).identity_of(recipe_of(config))
    if trained["fingerprint"] != now["fingerprint"]:
        raise DataError(
            f"{config.data.store} is not the store that {run} was trained on",
            "; ".join(differences(trained["facts"], now["facts"])),
            "prepare it from the same sources again, or train the run on this one",
        )
    return found


def store_of(config: Config) -> GridStore:
    """The run's store."""
    return GridStore(config.data.store)


def recipe_of(config: Config) -> Degradation:
    """What was done to the images that it was trained on."""
    data = config.data
    return Degradation(bias=data.bias, noise=data.noise, seed=data.degrade_seed)


def _status(run: Path) -> dict[str, object]:
    try:
        return read_json(run / STATUS)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{run / STATUS} is not JSON", str(error)) from error
