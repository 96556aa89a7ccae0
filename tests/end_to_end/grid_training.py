"""Small stores of grids and configs for tests of training; imported by name from workers."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from xdist.config import Config, override, parse

SIZES = (9, 8, 7)
TEXT = {
    "mamba_nd": """
[run]
name = "run"
[model]
kind = "mamba_nd"
sizes = [9, 8, 7]
patch = [2, 2, 2]
classes = 3
dim = 8
depth = 1
dtype = "float64"
options = { bases = 4, head_hidden = 8 }
[data]
kind = "volume"
slab = [2, 2, 4]
noise = 10.0
bias = 0.2
[train]
precision = "float64"
curriculum = [{ crop = [7, 8, 6], batch = 2, steps = 2 }, { batch = 2, steps = 2 }]
[optimizer]
warmup_steps = 2
[checkpoint]
every_steps = 3
[certify]
sizes = [5, 4, 3]
[log]
every_steps = 1000
""",
    "vdt": """
[run]
name = "run"
[model]
kind = "vdt"
sizes = [5, 8, 8]
patch = [1, 4, 2]
dim = 8
head_dim = 4
depth = 1
dtype = "float64"
[data]
kind = "video"
[train]
precision = "float64"
curriculum = [{ crop = [4, 8, 6], batch = 2, steps = 1 }, { batch = 2, steps = 2 }]
[optimizer]
warmup_steps = 2
[evaluate]
samples = 3
[certify]
sizes = [3, 5, 4]
[log]
every_steps = 1000
""",
}


def make_stores(folder: pathlib.Path) -> None:
    """A volume with three classes, and seven short videos with three held out."""
    from xdist.data.nifti import write_nifti
    from xdist.data.video import Bouncing, prepare_video
    from xdist.data.volume import Volume, prepare_volume

    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, SIZES).astype(np.uint8)
    classes = np.digitize(image, [80, 160]).astype(np.uint8)
    write_nifti(folder / "t1.nii", image, np.eye(4))
    write_nifti(folder / "classes.nii", classes, np.eye(4))
    volume = Volume((folder / "t1.nii",), labels=folder / "classes.nii")
    prepare_volume([volume], folder / "mamba_nd.zarr")
    bouncing = Bouncing(frames=5, height=8, width=8, shapes=1)
    prepare_video(bouncing, folder / "vdt.zarr", samples=4, held_out=3)


def config_of(folder: pathlib.Path, kind: str, name: str, *settings: str) -> Config:
    """The tiny config of a model on its store in `folder`, with `key=value` settings."""
    chosen = [f"run.directory={folder / 'runs'}", f"data.store={folder / f'{kind}.zarr'}"]
    keyed = {item.partition("=")[0]: item for item in [*chosen, f"run.name={name}", *settings]}
    return override(parse(TEXT[kind], "tiny.toml"), list(keyed.values()))


def run_each(folder: str, cases: list[tuple[str, str, tuple[str, ...]]]) -> list[tuple[int, str]]:
    """Train each (kind, name, settings) on the ranks this process belongs to: exit code, error."""
    from xdist.errors import XdistError
    from xdist.train import run

    found = []
    for kind, name, settings in cases:
        try:
            config = config_of(pathlib.Path(folder), kind, name, *settings)
            found.append((run(config), ""))
        except XdistError as error:
            found.append((error.exit_code, str(error)))
    return found


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `eval` objects of metrics.jsonl, in order."""
    return [line["eval"] for line in lines if "eval" in line]
