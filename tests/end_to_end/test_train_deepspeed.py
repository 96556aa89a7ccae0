"""`xdist launch local` with engine.name = "deepspeed": whole runs, quiet and without a compiler."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.end_to_end.training import config_of, held_out, losses, make_store, status_of
from tests.launchers.conftest import PATHS
from xdist.config import to_toml
from xdist.train import run

ON = "engine.name=deepspeed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store, and a whole run of the plain engine on one rank."""
    made = tmp_path_factory.mktemp("deepspeed")
    make_store(made)
    assert run(config_of(made, "plain")) == 0
    return made


def launch(folder: pathlib.Path, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """Two ranks started by the command, in an empty folder, with an empty home and no program to
    be found in PATH: a compiler that is asked for is an error."""
    config = config_of(folder, name, "parallel.ulysses=2", "launch.ranks=2", ON, *settings)
    place = folder / name
    for part in ("home", "bin", "work", "tmp"):
        (place / part).mkdir(parents=True)
    (place / "run.toml").write_text(to_toml(config))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CC", "CXX", "DS_"))}
    return subprocess.run(
        [sys.executable, "-P", "-m", "xdist_launchers.cli", "launch", "local", "../run.toml"],
        env=kept
        | {
            "PYTHONPATH": PATHS,
            "HOME": str(place / "home"),
            "PATH": str(place / "bin"),
            "TMPDIR": str(place / "tmp"),
        },
        cwd=place / "work",
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def _written(folder: pathlib.Path, name: str) -> list[str]:
    """Files beside the run's own folder, compiled byte code apart."""
    place = folder / name
    found = [p for part in ("home", "work", "tmp") for p in (place / part).rglob("*")]
    return [str(p.relative_to(place)) for p in found if p.is_file() and p.suffix != ".pyc"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("zero2", ["engine.zero_stage=2"]),
        pytest.param("zero0", ["engine.zero_stage=0"], marks=pytest.mark.slow),
        pytest.param(
            "zero1", ["engine.zero_stage=1", "engine.offload_optimizer=cpu"], marks=pytest.mark.slow
        ),
        pytest.param(
            "zero3",
            [
                "engine.zero_stage=3",
                "engine.offload_optimizer=cpu",
                "engine.offload_parameters=cpu",
                "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.timeout(450)
def test_launched_runs_end_as_plain_ones(
    folder: pathlib.Path, name: str, settings: list[str]
) -> None:
    done = launch(folder, name, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    config, plain = config_of(folder, name), config_of(folder, "plain")
    assert losses(config) == pytest.approx(losses(plain), rel=0, abs=1e-5)
    assert held_out(config) == pytest.approx(held_out(plain), rel=0, abs=1e-5)
    assert status_of(config)["state"] == "finished"
    facts = [json.loads((c.run_directory / "run.json").read_text()) for c in (config, plain)]
    assert facts[0]["parameters"] == facts[1]["parameters"] > 0
    # Quiet, and nothing written by DeepSpeed.
    said = (done.stdout + done.stderr).replace(str(folder), "").lower()
    said = said.replace("deepspeed's own exchanges", "")  # what the plan says
    for word in ("deepspeed", "warning", "[info]", "traceback"):
        assert word not in said, done.stdout + done.stderr
    assert _written(folder, name) == []
