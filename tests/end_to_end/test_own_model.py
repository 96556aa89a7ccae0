"""docs/own_model.md: a user's own module trained with nothing but the library."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.training import config_of, held_out, losses, make_store
from xdist.testing import RankPool
from xdist.train import run

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("train.curriculum=[{length=61,batch=2,steps=6}]", "checkpoint.every_steps=0")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's code, as a file."""
    page = (ROOT / "docs" / "own_model.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 1
    path = tmp_path_factory.mktemp("own") / "own_model.py"
    path.write_text(blocks[0], encoding="utf-8")
    return path


def _main(script: str) -> list[float]:
    return runpy.run_path(script)["main"]()


def test_the_page_gives_the_same_losses_on_1_2_and_3_ranks(
    script: Path, pool2: RankPool, pool3: RankPool
) -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "launchers"))
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one = [float(x) for x in re.findall(r"^step \d+: ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(one) == 12
    assert one[-1] < 0.8 * one[0]
    two, three = pool2.run(_main, str(script)), pool3.run(_main, str(script))
    for found in two + three:
        # Four digits are printed; the ranks agree much closer.
        assert found == pytest.approx(one, rel=0, abs=6e-5)
        assert found == pytest.approx(two[0], rel=2e-6)


def _run(folder: str, script: str, name: str, *settings: str) -> int:
    model = runpy.run_path(script)["Model"]
    config = config_of(Path(folder), name, *SETTINGS, *settings)
    return run(config, build=lambda config: model())


def test_the_page_s_model_trains_in_the_loop_under_every_engine(
    script: Path, tmp_path: Path, pool2: RankPool
) -> None:
    """Its blocks are gathered one by one under fsdp; the losses are those of one rank."""
    make_store(tmp_path)
    where = (str(tmp_path), str(script))
    assert _run(*where, "one") == 0
    one = config_of(tmp_path, "one", *SETTINGS)
    for name, settings in {
        "plain": ("parallel.ulysses=2",),
        "fsdp": ("parallel.ring=2", "engine.name=fsdp"),
        "data": ("parallel.data=2", "engine.name=fsdp", "engine.reshard=false"),
    }.items():
        assert pool2.run(_run, *where, name, *settings) == [0, 0]
        many = config_of(tmp_path, name, *SETTINGS, *settings)
        assert losses(many) == pytest.approx(losses(one), rel=1e-5)
        assert held_out(many) == pytest.approx(held_out(one), rel=1e-5)
