"""Failure 14: a rank that ran out of memory says what held it, and which settings need less."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import resource
import socket
import traceback
from collections.abc import Iterator

import torch

from xdist.config import Config, Stage, override
from xdist.errors import ConfigError, OutOfMemoryError
from xdist.train.engines.protocol import Engine

# The CPU's allocator has no exception class of its own.
_CPU = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
# What oneDNN says of it, and of other things.
_VAGUE = re.compile(r"could not create a (primitive|memory)", re.IGNORECASE)
_LITTLE_BYTES = 2**28
_SMALLEST_TILE = 64
_BETWEEN = ("evaluation", "save")  # phases that belong to no step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, the CPU's allocator or Python itself had no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError | OSError):
        return False
    return bool(_CPU.search(str(error))) or (bool(_VAGUE.search(str(error))) and _little_is_left())


def _little_is_left() -> bool:
    """Whether this process has next to no address space left under its limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return False
    pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return limit - pages * resource.getpagesize() < _LITTLE_BYTES


def out_of_memory(
    error: BaseException,
    config: Config,
    engine: Engine | None,
    where: str,
    step: int,
    *,
    planned: bool,
) -> OutOfMemoryError:
    """The error to raise for `error`, in phase `where` after `step` steps.

    Its second line holds the plan's parts beside what is measured, its last the settings to try, in
    order, with the plan's peak under each. `planned`: the plan knows the model.
    """
    # What the interrupted functions held is needed to go on.
    traceback.clear_frames(error.__traceback__)
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    why = [first, _measured(engine)]
    do = "use more ranks a sequence, smaller tiles (train.tile_tokens) or partitioned state"
    if planned:
        stage = _stage(config, step)
        why.append(_parts(config, stage))
        tries = [f"{setting} (planned {_size(peak)})" for setting, peak in _remedies(config, stage)]
        do = f"try, in this order: {', '.join(tries)}" if tries else do
    when = f"after step {step}" if where in _BETWEEN else f"of step {step + 1}"
    return OutOfMemoryError(
        f"{socket.gethostname()}: out of memory in {where or 'set-up'} {when}",
        "; ".join(part for part in why if part),
        do,
    )


def _measured(engine: Engine | None) -> str:
    """Bytes this rank holds of parameters, gradients and optimizer state, and the peak."""
    held = []
    if engine is not None:
        parameters = list(engine.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = [
            piece.values for name, piece in engine.pieces().items() if name.startswith("optimizer/")
        ]
        for name, tensors in (("parameters", parameters), ("gradients", gradients)):
            held.append(f"{name} {_size(sum(t.nbytes for t in tensors))}")
        if state:
            held.append(f"optimizer state {_size(sum(t.nbytes for t in state))}")
    if torch.cuda.is_available():
        held.append(f"peak allocated {_size(torch.cuda.max_memory_allocated())}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return "held: " + ", ".join([*held, f"peak resident {_size(peak)}"])


def _parts(config: Config, stage: Stage) -> str:
    from xdist.plan.step import step_memory

    largest = max(
        (step_memory(config, stage, rank) for rank in range(config.ranks)),
        key=lambda memory: memory.peak_bytes,
    )
    parts = [f"{f.name} {_size(getattr(largest, f.name))}" for f in dataclasses.fields(largest)]
    return f"planned peak {_size(largest.peak_bytes)}: {', '.join(parts)}"


def _remedies(config: Config, stage: Stage) -> Iterator[tuple[str, int]]:
    """Settings whose planned peak is below today's, in the order to try them."""
    now, tile = _peak(config, stage), config.train.tile_tokens
    degree, ranks = config.parallel.ulysses, config.ranks
    tried: list[list[str]] = [[f"parallel.ulysses={2 * degree}", f"launch.ranks={2 * ranks}"]]
    tried += [[f"train.tile_tokens={t}"] for t in (tile // 4, tile // 16) if t >= _SMALLEST_TILE]
    if config.engine.name == "plain" and config.ranks > 1:
        tried += [["engine.name=fsdp"]]
    if config.engine.name == "deepspeed" and config.engine.zero_stage < 3:
        tried += [[f"engine.zero_stage={config.engine.zero_stage + 1}"]]
    if stage.batch > config.data_degree:
        index = config.train.curriculum.index(stage)
        low = max(stage.batch // 2 // config.data_degree, 1) * config.data_degree
        tried += [[f"train.curriculum.{index}.batch={low}"]]
    for settings in tried:
        with contextlib.suppress(ConfigError):
            changed = override(config, settings)
            peak = _peak(changed, _stage_like(changed, config, stage))
            if peak < now:
                yield " ".join(settings), peak


def _peak(config: Config, stage: Stage) -> int:
    from xdist.plan import peak_memory

    return max(peak_memory(config, stage))


def _stage(config: Config, step: int) -> Stage:
    from xdist.train.resume import stage_of

    return config.train.curriculum[stage_of(config, step)]


def _stage_like(changed: Config, config: Config, stage: Stage) -> Stage:
    return changed.train.curriculum[config.train.curriculum.index(stage)]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
