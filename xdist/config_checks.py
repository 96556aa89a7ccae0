"""Checks over several settings: the arithmetic that failed, and the nearest settings that hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdist.config_pattern import KNOWN, parse_pattern
from xdist.errors import ConfigError, GeometryError, StrategyError

if TYPE_CHECKING:
    from xdist.config import Config
    from xdist.config_text import Path


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the keys it read, the three lines, and the kind of error."""

    keys: tuple[Path, ...]
    what: str
    why: str
    do: str
    kind: type[ConfigError] = ConfigError
    where: str = ""
    brief: bool = False  # whether `what` says enough when it is one of a list
    place: str = ""  # where, when `what` already says it

    @property
    def line(self) -> str:
        """The place, what is wrong, why, and the remedy, on one line."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return head if self.brief else "; ".join(part for part in (head, self.why, self.do) if part)


def raise_problems(found: list[Problem], source: str) -> None:
    """Raise one ConfigError for all of `found`; nothing when it is empty."""
    if not found:
        return
    kinds = {problem.kind for problem in found}
    kind = kinds.pop() if len(kinds) == 1 else ConfigError
    if len(found) == 1:
        one = found[0]
        raise kind(f"{one.where}: {one.what}" if one.where else one.what, one.why, one.do)
    raise kind(
        f"{source}: {len(found)} settings are wrong",
        "\n".join(f"  {problem.line}" for problem in found),
        "mend them all; docs/config.md lists every key with its type and default",
    )


def nearest(value: int, choices: Iterable[int], count: int = 2) -> list[int]:
    """The `count` choices nearest to `value`, ascending."""
    return sorted(sorted(set(choices), key=lambda choice: (abs(choice - value), choice))[:count])


def divisors(value: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    return [d for d in range(1, value + 1) if value % d == 0]


def _either(settings: Iterable[str]) -> str:
    """Up to three settings as a remedy."""
    return "nearest valid settings: " + ", or ".join(dict.fromkeys(list(settings)[:3]))


def geometry(config: Config) -> list[Problem]:
    """ranks = data x ring x ulysses."""
    parallel, ranks = config.parallel, config.launch.ranks
    if ranks is None:
        return []
    inner = parallel.sequence_ranks
    keys: tuple[Path, ...] = (
        ("launch", "ranks"),
        ("parallel", "data"),
        ("parallel", "ring"),
        ("parallel", "ulysses"),
    )
    if parallel.data is None and ranks % inner == 0:
        return []
    if parallel.data is None:
        why = (
            f"{ranks} ranks / (ring {parallel.ring} x ulysses {parallel.ulysses}) = "
            f"{ranks}/{inner} is not a whole number of data ranks"
        )
        multiples = [m for m in (ranks // inner * inner, -(-ranks // inner) * inner) if m]
    else:
        product = parallel.data * inner
        if product == ranks:
            return []
        why = (
            f"data {parallel.data} x ring {parallel.ring} x ulysses {parallel.ulysses} = "
            f"{product}, not {ranks}"
        )
        multiples = [product]
    settings = []
    if parallel.data is not None and ranks % inner == 0:
        settings.append(f"parallel.data={ranks // inner}")
    for name, other in (("ulysses", parallel.ring), ("ring", parallel.ulysses)):
        degree = getattr(parallel, name)
        held = other * (parallel.data or 1)
        # A degree the user left at 1 is not offered while the other one is in use.
        if ranks % held == 0 and (degree > 1 or inner == 1):
            free = ranks // held
            # Of two that are as near, the larger: fewer ranks per sequence is seldom the wish.
            fit = min(divisors(free), key=lambda d: (abs(d - degree), -d))
            settings.append(f"parallel.{name}={free if parallel.data is not None else fit}")
    settings[1:1] = [f"launch.ranks={m}" for m in nearest(ranks, multiples, 2)]
    what = f"{ranks} ranks do not fit the degrees of [parallel]"
    return [Problem(keys, what, why, _either(settings), GeometryError)]


def batches(config: Config) -> list[Problem]:
    """Each stage's batch splits evenly over the data ranks."""
    degree = config.data_degree
    found = []
    for index, stage in enumerate(config.train.curriculum):
        if degree < 1 or stage.batch % degree == 0:
            continue
        key: Path = ("train", "curriculum", index, "batch")
        low, high = stage.batch // degree * degree, -(-stage.batch // degree) * degree
        name = f"train.curriculum.{index}.batch"
        settings = [f"{name}={value}" for value in (low, high) if value]
        fit = nearest(degree, divisors(stage.batch), 1)[0]
        settings.append(f"parallel.data={fit} (with {fit * config.parallel.sequence_ranks} ranks)")
        what = f"stage {index} cannot share {stage.batch} sequences among {degree} data ranks"
        why = (
            f"{name} = {stage.batch} (global batch {stage.batch * config.train.accumulation} with "
            f"accumulation {config.train.accumulation}): {stage.batch} / {degree} data ranks = "
            f"{stage.batch // degree} remainder {stage.batch % degree}"
        )
        keys: tuple[Path, ...] = (
            key,
            ("parallel", "data"),
            ("parallel", "ring"),
            ("parallel", "ulysses"),
            ("launch", "ranks"),
        )
        found.append(Problem(keys, what, why, _either(settings), GeometryError))
    return found


def model_shape(config: Config) -> list[Problem]:
    """The pattern is known and the heads fill the width."""
    model = config.model
    found: list[Problem] = []
    if model.kind not in KNOWN:
        return found
    try:
        parse_pattern(model.pattern, model.kind)
    except ConfigError as error:
        found.append(Problem((("model", "pattern"),), error.what, error.why, error.do))
    # Mixers check their heads themselves: some fill a multiple of the width, some none of it.
    if model.dim % model.head_dim and model.kind == "hybrid_lm":
        dims = {model.dim // model.head_dim * model.head_dim}
        dims.add(-(-model.dim // model.head_dim) * model.head_dim)
        settings = [f"model.dim={d}" for d in sorted(dims) if d]
        fit = nearest(model.head_dim, divisors(model.dim), 1)[0]
        found.append(
            Problem(
                (("model", "head_dim"), ("model", "dim")),
                f"heads of {model.head_dim} channels do not fill model.dim = {model.dim}",
                f"{model.dim} / {model.head_dim} = {model.dim // model.head_dim} remainder "
                f"{model.dim % model.head_dim}",
                _either([*settings, f"model.head_dim={fit}"]),
            )
        )
    return found


def strategies(config: Config) -> list[Problem]:
    """hybrid_lm streams its layers over tiles: windows by halo, recurrences by scan, no others."""
    model, parallel = config.model, config.parallel
    found: list[Problem] = []
    if model.kind != "hybrid_lm":
        return found
    try:
        layers = parse_pattern(model.pattern)
    except ConfigError:
        layers = ()
    why = f"{model.kind} streams every layer over tiles of train.tile_tokens; "
    if "attention" in layers and model.window is None:
        text = "an attention layer then holds one window of keys, and across ranks a halo as wide"
        remedies = ["model.window=256", f"model.pattern=linear*{len(layers)}"]
        what = 'model.window = "none" cannot be honoured: every query would see every earlier key'
        keys: tuple[Path, ...] = (("model", "window"), ("model", "pattern"))
        found.append(Problem(keys, what, why + text, _either(remedies), StrategyError))
    for name, layer, only in (("attention", "attention", "halo"), ("recurrent", "linear", "scan")):
        chosen = getattr(parallel, name)
        if chosen not in ("auto", only):
            what = f'parallel.{name} = "{chosen}" cannot be honoured by {model.kind}'
            text = f"its {layer} layers then cross ranks by {only}"
            remedies = [f"parallel.{name}=auto", f"parallel.{name}={only}"]
            keys = (("parallel", name),)
            found.append(Problem(keys, what, why + text, _either(remedies), StrategyError))
    if config.run.kernels not in ("auto", "torch"):
        what = f'run.kernels = "{config.run.kernels}" cannot be honoured by {model.kind}'
        text = "the tiles have passes of their own, which torch computes"
        remedies = ["run.kernels=auto", "model.kind=mixer_lm, whose mixers take run.kernels"]
        keys = (("run", "kernels"), ("model", "kind"))
        found.append(Problem(keys, what, why + text, _either(remedies), StrategyError))
    return found


def combinations(config: Config) -> list[Problem]:
    """Settings that contradict each other or would have no effect."""
    model, train, data = config.model, config.train, config.data
    found = []
    if (model.dtype == "float64") != (train.precision == "float64"):
        found.append(
            Problem(
                (("train", "precision"), ("model", "dtype")),
                f'train.precision = "{train.precision}" does not fit model.dtype = "{model.dtype}"',
                "products in float64 need parameters in float64, and only they do",
                _either(
                    [
                        "train.precision=float64 with model.dtype=float64",
                        "train.precision=float32 with model.dtype=float32",
                    ]
                ),
            )
        )
    if data.on_bad == "stop" and data.max_bad:
        found.append(
            Problem(
                (("data", "max_bad"), ("data", "on_bad")),
                f'data.max_bad = {data.max_bad} has no effect with data.on_bad = "stop"',
                "the first bad sample stops the run",
                _either(["data.on_bad=skip", "data.max_bad=0"]),
            )
        )
    if config.evaluate.tokens < config.evaluate.length:
        found.append(
            Problem(
                (("evaluate", "length"), ("evaluate", "tokens")),
                "one evaluated sequence is longer than the tokens of an evaluation",
                f"evaluate.length = {config.evaluate.length} > evaluate.tokens = "
                f"{config.evaluate.tokens}",
                _either(
                    [
                        f"evaluate.length={config.evaluate.tokens}",
                        f"evaluate.tokens={config.evaluate.length}",
                    ]
                ),
            )
        )
    return found


def problems(config: Config) -> list[Problem]:
    """Every cross-field problem of a config whose single fields are valid."""
    shape = geometry(config)
    # The batch arithmetic needs degrees that multiply up.
    found = shape + ([] if shape else batches(config))
    # They build on this module.
    from xdist.config_deepspeed import engine_problems
    from xdist.config_grids import grid_problems
    from xdist.config_mixers import mixer_problems
    from xdist.config_optimizer import optimizer_problems
    from xdist.config_ray import ray_problems
    from xdist.config_transformers import transformers_problems

    found += model_shape(config) + strategies(config) + mixer_problems(config)
    found += transformers_problems(config) + grid_problems(config)
    found += combinations(config)
    found += optimizer_problems(config)
    return found + engine_problems(config) + ray_problems(config)


def world_problem(config: Config, world: int) -> Problem | None:
    """The problem of running this config on `world` ranks, if any."""
    parallel, wanted = config.parallel, config.launch.ranks
    inner = parallel.sequence_ranks
    fits = world % inner == 0 if parallel.data is None else world == parallel.data * inner
    if fits and wanted in (None, world):
        return None
    data = "auto" if parallel.data is None else parallel.data
    # With data "auto" the config's own number of ranks may be a smaller multiple.
    settings = [f"`xdist launch local CONFIG --ranks {config.ranks}`"]
    if parallel.data is None and world % inner:
        settings.append(f"parallel.ulysses={world} parallel.ring=1")
    elif fits:
        settings.append(f"launch.ranks={world}")
    return Problem(
        (("launch", "ranks"),),
        f"this config needs {config.ranks} ranks, and {world} {'is' if world == 1 else 'are'} "
        "running",
        f"launch.ranks {wanted or 'auto'}, data {data} x ring {parallel.ring} x ulysses "
        f"{parallel.ulysses}",
        f"use {', or '.join(settings)}",
        GeometryError,
    )


def store_problem(config: Config) -> Problem | None:
    """The problem of training without a data store; showing and planning need none."""
    if config.data.store:
        return None
    return Problem(
        (("data", "store"),),
        "data.store is not set",
        f"training reads its samples from a store made by `xdist prepare {config.data.kind}`",
        "set data.store=STORE",
    )
