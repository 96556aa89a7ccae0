"""`make gpu` cannot run here; its code can, on the CPU at short lengths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


# What a machine with a card need not have.
ABSENT = ("zarr", "pydantic", "ray", "deepspeed", "typer", "rich", "safetensors")


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    tree = [str(ROOT / part) for part in (".", "kernels", "launchers")]
    paths = os.pathsep.join([str(folder), *tree])
    return subprocess.run(
        [sys.executable, "tests/gpu/main.py", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_without_a_card_one_line_says_so(tmp_path: Path) -> None:
    result = _run(tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("gpu: torch ")
    assert result.stdout.count("\n") == 1


@pytest.mark.slow
def test_law_1_and_a_step_run_on_the_cpu_through_the_same_code(tmp_path: Path) -> None:
    result = _run(tmp_path, "--device", "cpu", "--small", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stdout + result.stderr
    laws, step = sorted(
        (tmp_path / "out").glob("*.json"), key=lambda path: len(path.name), reverse=True
    )
    rows = json.loads(laws.read_text("utf-8"))["rows"]
    assert {row["ranks"] for row in rows} == {1, 2}
    assert {row["dtype"] for row in rows} == {"float64", "float32"}
    assert all(row["passed"] for row in rows)
    assert json.loads(step.read_text("utf-8"))["rows"][0]["tokens"] == 1024
