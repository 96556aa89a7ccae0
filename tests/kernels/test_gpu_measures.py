"""`make gpu-parity`, `-linear`, `-attention` and `-memory` cannot run here; their code can.

It goes through Triton's interpreter at tiny shapes, where the numbers mean nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("parity", "linear", "attention", "memory")
# What a machine with a card need not have.
ABSENT = ("zarr", "pydantic", "ray", "deepspeed", "typer", "rich", "safetensors")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a file of tests/gpu by its name."""
    # Set by the commands themselves; restored behind this test.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    yield importlib.import_module
    sys.path[:] = before


def _json(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text("utf-8"))


def test_without_a_card_each_says_so_in_one_line(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in COMMANDS:
        assert module(f"gpu_{command}").main(["--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"gpu-{command}: torch ")
        assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _table(module: Any, folder: Path, *options: str, until: float = 60.0) -> Any:
    rows = module("gpu_rows")
    given = rows.options("", ["--device", "cpu", "--out", str(folder), *options])
    given.until = time.time() + until
    return rows.Table("gpu-toy", "Toys", "make gpu-toy", given, {"time": "Times"})


def test_finished_rows_are_kept_and_what_was_cut_is_made_later(module: Any, tmp_path: Path) -> None:
    table = _table(module, tmp_path)
    table.measure("time", "a", lambda: {"ms": 1.5})
    table.measure("time", "b", lambda: 1 / 0)
    table.longest_s = 100.0
    assert table.measure("time", "c", lambda: {"ms": 3.0}) is None
    assert table.finish() == 1, "a row failed"
    found = _json(tmp_path)
    assert [(row["case"], row.get("failed", False)) for row in found["rows"]] == [
        ("a", False),
        ("b", True),
    ]
    assert "ZeroDivisionError" in found["rows"][1]["remark"]
    assert found["left"] == ["time: c"]

    # A second call makes what failed and what was left, and nothing twice.
    table = _table(module, tmp_path)
    table.measure("time", "a", lambda: pytest.fail("made twice"))
    table.measure("time", "b", lambda: {"ms": 2.0})
    table.measure("time", "c", lambda: {"ms": 3.0})
    assert table.finish() == 0
    found = _json(tmp_path)
    assert {row["case"]: row["ms"] for row in found["rows"]} == {"a": 1.5, "b": 2.0, "c": 3.0}
    assert found["left"] == []
    page = next(tmp_path.glob("*.md")).read_text("utf-8")
    assert "| a | 1.5 |" in page
    for said in ("driver", "torch", "triton", "Absent:", "make gpu-toy"):
        assert said in page
    absent = page.partition("Absent:")[2]
    rivals = module("gpu_rivals").found()
    assert rivals
    assert all(name in absent or f"{name} {x}" in page for name, x in rivals.items())


def test_rows_of_other_kernels_or_machines_are_not_taken_over(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = module("gpu_rows")
    table = _table(module, tmp_path)
    table.measure("time", "a", lambda: {"ms": 1.0})
    assert [row["case"] for row in _table(module, tmp_path).rows] == ["a"]
    assert _table(module, tmp_path, "--again").rows == []
    monkeypatch.setattr(rows, "sources", lambda: "00000000")
    assert _table(module, tmp_path).rows == []
    monkeypatch.undo()
    machine = table.machine | {"driver": "580.1"}
    monkeypatch.setattr(rows, "machine", lambda: machine)
    assert _table(module, tmp_path).rows == []


def test_a_fault_on_the_card_goes_on_in_a_new_process_and_memory_is_a_finding(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[list[str]] = []

    def execute(program: str, arguments: list[str]) -> None:
        started.append(arguments)

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", ["tests/gpu/gpu_toy.py", "--device", "cuda", "--again"])
    table = _table(module, tmp_path)
    table.options.device = "cuda"

    def fault() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def full() -> dict[str, Any]:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    table.measure("time", "full", full)
    assert not started
    table.measure("time", "fault", fault)
    ((_, file, *options),) = started
    assert file.endswith("gpu_toy.py")
    assert options[:3] == ["--device", "cuda", "--until"], "finished rows are not made again"
    # The process that goes on does not try the row that broke the card again; a later call does.
    assert [row["case"] for row in _table(module, tmp_path, *options[2:]).rows] == ["full", "fault"]
    assert [row["case"] for row in _table(module, tmp_path).rows] == ["full"]


def _small(module: Any, command: str, folder: Path) -> dict[str, Any]:
    assert module(f"gpu_{command}").main(["--device", "cpu", "--small", "--out", str(folder)]) == 0
    found = _json(folder)
    assert found["left"] == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["linear", "attention", "memory"])
def test_the_same_code_measures_in_the_interpreter(
    module: Any, command: str, tmp_path: Path
) -> None:
    found = _small(module, command, tmp_path)
    assert {"torch", "triton", "driver"} <= set(found["machine"])
    groups = {row["group"] for row in found["rows"]}
    assert {"linear": "time", "attention": "time", "memory": "million"}[command] in groups
    assert not [row for row in found["rows"] if row.get("failed")]
    assert (tmp_path / f"gpu-{command}-{found['date']}.md").exists()


@pytest.mark.slow
def test_errors_are_measured_from_a_plain_copy_without_optional_packages(tmp_path: Path) -> None:
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    tree = [str(ROOT / part) for part in (".", "kernels", "launchers")]
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "tests/gpu/gpu_parity.py", "--device", "cpu", "--small", "--out", out],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *tree]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [row for row in _json(out)["rows"] if row["case"].endswith("xdist")]
    assert {row["case"].partition(",")[0] for row in rows} >= {"GLA", "KDA", "Mamba-2 (ssd)"}
    assert all(row["output"] <= 1e-5 and row["worst gradient"] <= 1e-5 for row in rows)
