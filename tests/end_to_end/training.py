"""A small store and configs for tests of training; imported by name from test files and workers."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

from xdist.config import Config, override, parse

TEXT = """
[run]
name = "run"
[model]
dim = 16
head_dim = 8
pattern = "linear,attention"
window = 9
ngram_orders = [2, 3]
ngram_buckets = 61
[train]
curriculum = [{ length = 61, batch = 2, steps = 3 }, { length = 96, batch = 2, steps = 3 }]
tile_tokens = 40
[optimizer]
warmup_steps = 2
[checkpoint]
every_steps = 2
[evaluate]
tokens = 250
length = 100
[log]
every_steps = 1000
"""


def make_store(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A store of 24 short files of made-up words, small chunks."""
    from xdist.data.prepare import prepare_text

    draw = random.Random(seed)
    words = [bytes(draw.randrange(97, 123) for _ in range(draw.randrange(2, 7))) for _ in range(40)]
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number in range(24):
        (text / f"{number:02}.txt").write_bytes(b" ".join(draw.choices(words, k=60)))
    prepare_text([text], folder / "store.zarr", held_out_fraction=0.2, chunk_bytes=1024)
    return folder / "store.zarr"


def config_of(folder: pathlib.Path, name: str, *settings: str) -> Config:
    """The tiny config on the store in `folder`, with `key=value` settings."""
    chosen = [f"run.directory={folder / 'runs'}", f"data.store={folder / 'store.zarr'}"]
    keyed = {item.partition("=")[0]: item for item in [*chosen, f"run.name={name}", *settings]}
    return override(parse(TEXT, "tiny.toml"), list(keyed.values()))


def lines_of(config: Config) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl."""
    path = config.run_directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(config: Config) -> list[float]:
    """The loss of each step, in order."""
    return [line["loss"] for line in lines_of(config) if "eval" not in line]


def held_out(config: Config) -> float:
    """The loss of the last evaluation."""
    return [line["eval"]["loss"] for line in lines_of(config) if "eval" in line][-1]


def status_of(config: Config) -> dict[str, Any]:
    """status.json."""
    return json.loads((config.run_directory / "status.json").read_text())


class CutShortError(Exception):
    """Raised at a named point to end a run there, without ending the process."""


def cut_short(name: str) -> None:
    """End the run at the point `name`."""
    raise CutShortError(name)


def run_until(folder: str, name: str, point: str, occurrence: int, *settings: str) -> None:
    """Train until the `occurrence`-th passing of `point`, and leave everything as it is then."""
    from xdist.checkpoint import Cut
    from xdist.train import run

    config = config_of(pathlib.Path(folder), name, *settings)
    try:
        run(config, on_point=Cut(point, occurrence, cut_short))
    except CutShortError:
        return
    raise AssertionError(f"{point} was not passed {occurrence} times")


def run_here(folder: str, name: str, *settings: str) -> tuple[int, str]:
    """Train on the ranks this process belongs to: exit code, and the error's text."""
    from xdist.errors import XdistError
    from xdist.train import run

    try:
        return run(config_of(pathlib.Path(folder), name, *settings)), ""
    except XdistError as error:
        return error.exit_code, str(error)
