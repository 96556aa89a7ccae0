"""A volume that does not fit one rank under a stated limit trains on two under the same limit."""

from __future__ import annotations

import os
import pathlib
import resource

import numpy as np
import pytest

from tests.end_to_end.training import lines_of
from xdist.config import Config, override, parse
from xdist.errors import OutOfMemoryError
from xdist.testing import RankPool
from xdist.train import run
from xdist.train.setup import build_model

SIZES = (56, 48, 40)
# Beyond what a rank holds after its first step, on a small crop. Of what it can write to, not of
# addresses: of those each new thread takes 64 MiB, now or later.
LIMIT_BYTES = 160 << 20
TEXT = """
[run]
name = "one"
[model]
kind = "axial"
sizes = [56, 48, 40]
patch = [2, 2, 2]
classes = 3
dim = 32
depth = 2
recompute = false
[data]
kind = "volume"
slab = [2, 18, 20]
prefetch = 1
[train]
curriculum = [{ crop = [8, 8, 8], batch = 1, steps = 1 }, { batch = 1, steps = 1 }]
[evaluate]
samples = 1
[log]
every_steps = 1000
"""


def _config(folder: str, *settings: str) -> Config:
    chosen = [f"run.directory={folder}/runs", f"data.store={folder}/volume.zarr", *settings]
    return override(parse(TEXT), chosen)


def _make_store(folder: pathlib.Path) -> None:
    from xdist.data.nifti import write_nifti
    from xdist.data.volume import Volume, prepare_volume

    image = np.random.default_rng(0).integers(0, 256, SIZES).astype(np.uint8)
    write_nifti(folder / "t1.nii", image, np.eye(4))
    write_nifti(folder / "classes.nii", np.digitize(image, [80, 160]).astype(np.uint8), np.eye(4))
    volume = Volume((folder / "t1.nii",), labels=folder / "classes.nii")
    prepare_volume([volume], folder / "volume.zarr")


def _limited(folder: str, *settings: str) -> str:
    """Train; after the first step this process may take `LIMIT_BYTES` more, no more."""
    before = resource.getrlimit(resource.RLIMIT_DATA)

    def on_point(point: str) -> None:
        if point == "train.recorded" and resource.getrlimit(resource.RLIMIT_DATA) == before:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[5])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + LIMIT_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        if point == "train.status" and resource.getrlimit(resource.RLIMIT_DATA) != before:
            count[0] += 1

    count = [0]
    try:
        code = run(_config(folder, *settings), build=build_model, on_point=on_point)
    except OutOfMemoryError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return f"exit code {code}, {count[0]} steps under the limit"


@pytest.mark.slow
def test_a_volume_beyond_a_rank_s_limit_trains_on_two(
    tmp_path: pathlib.Path, pool2: RankPool
) -> None:
    _make_store(tmp_path)
    with RankPool(1) as pool:
        (said,) = pool.run(_limited, str(tmp_path))
    assert "out of memory in " in said
    assert "of step 2" in said
    both = pool2.run(_limited, str(tmp_path), "run.name=two", "parallel.ring=2")
    assert both == ["exit code 0, 3 steps under the limit"] * 2
    steps = [line for line in lines_of(_config(str(tmp_path), "run.name=two")) if "loss" in line]
    assert [step["sequence_length"] for step in steps] == [4 * 4 * 4, 28 * 24 * 20]
