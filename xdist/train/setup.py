"""What a run sets up once: the model, the plan beside which it is measured, the run's facts."""

from __future__ import annotations

import dataclasses
import json
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

import xdist
from xdist.config import Config, to_toml
from xdist.mesh import Mesh
from xdist.rank import read_rank
from xdist.train.agree import share_json_rows
from xdist.train.engines.protocol import Engine


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each step should send and hold, one list a stage, one entry a rank; empty: no plan."""

    sent_bytes: list[list[int]]
    peak_memory_bytes: list[list[int]]


def rank_of_process() -> int:
    """This process's rank, known before any process group is there."""
    return read_rank().rank


def settings_lines(config: Config) -> str:
    """Every setting as a line `section.key = value`, for ranks to compare."""
    tree = config.model_dump(mode="json")
    return "".join(
        f"{section}.{key} = {json.dumps(value)}\n"
        for section, values in tree.items()
        for key, value in values.items()
    )


def build_model(config: Config) -> nn.Module:
    """The model that config.model names, with this run's precision, tiles and strategies."""
    from xdist.models import build

    return build(
        config.model,
        precision=config.train.precision,
        tile_tokens=config.train.tile_tokens,
        seed=config.run.seed,
        parallel=config.parallel,
    )


def resolved(config: Config, ranks: int) -> Config:
    """The same config with the number of ranks that really run."""
    launch = config.launch.model_copy(update={"ranks": ranks})
    return config.model_copy(update={"launch": launch})


def planned(config: Config, ranks: int) -> Plan:
    """Bytes and memory of each stage from `xdist.plan`, computed without any process group."""
    from xdist.plan import peak_memory, step_bytes

    whole = resolved(config, ranks)
    stages = config.train.curriculum
    return Plan(
        [list(step_bytes(whole, stage)) for stage in stages],
        [list(peak_memory(whole, stage)) for stage in stages],
    )


def no_plan(config: Config) -> Plan:
    """For a model that the plan does not know: empty lists."""
    stages = len(config.train.curriculum)
    return Plan([[] for _ in range(stages)], [[] for _ in range(stages)])


def describe(
    config: Config, mesh: Mesh, engine: Engine, plan: Plan, of_work: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """config.toml as resolved, and the facts of run.json, those of the workload among them. Every
    rank has to call it."""
    hosts = share_json_rows(socket.gethostname(), mesh)
    facts = {
        "ranks": len(hosts),
        "hosts": hosts,
        "degrees": {"data": mesh.data_size, "ring": mesh.ring_size, "ulysses": mesh.ulysses_size},
        "device": str(mesh.device),
        "threads": config.run.threads,
        "parameters": _parameters(engine),
        **of_work,
        "planned_bytes": plan.sent_bytes,
        "planned_peak_memory_bytes": plan.peak_memory_bytes,
        "versions": versions(),
    }
    return to_toml(resolved(config, len(hosts))), facts


def _parameters(engine: Engine) -> int:
    """Elements of all parameters, which a rank may not hold."""
    specs = engine.specs()
    names = [f"model/{name}" for name, _ in engine.module.named_parameters()]
    return sum(specs[name].count for name in names)


def versions() -> dict[str, str]:
    """What computed the run: xdist, Python, torch, numpy, zarr, the machine."""
    found = {"xdist": xdist.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "zarr", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    found["machine"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        found["cuda device"] = torch.cuda.get_device_name()
    return found
