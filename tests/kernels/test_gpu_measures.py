"""`make gpu-parity`, `-linear`, `-attention` and `-memory` cannot run here; their code can.

It goes through Triton's interpreter at tiny shapes, where the numbers mean nothing. What becomes of
a row that hangs or crashes: test_gpu_supervisor.py.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
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
ABSENT = (
    "zarr", "pydantic", "ray", "deepspeed", "typer", "rich", "safetensors", "mpi4py", "psutil",
    "transformers", "nibabel", "hypothesis", "pytest", "fla", "flash_attn", "mamba_ssm",
    "causal_conv1d",
)  # fmt: skip


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a file of tests/gpu by its name."""
    # Set by the commands themselves; restored behind this test.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "benchmarks")]
    # Git is asked by the tests that start a command.
    monkeypatch.setattr(importlib.import_module("record"), "commit", lambda: "here")
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


def _table(module: Any, folder: Path, *options: str) -> Any:
    rows = module("gpu_rows")
    given = rows.options("", ["--device", "cpu", "--out", str(folder), *options])
    return rows.Table("gpu-toy", "Toys", "make gpu-toy", given, {"time": "Times"})


def _cases(table: Any) -> list[str]:
    return [row["case"] for row in table.of("time")]


def test_finished_rows_are_kept_and_what_was_cut_is_made_later(module: Any, tmp_path: Path) -> None:
    table = _table(module, tmp_path)
    table.measure("time", "a", lambda: {"ms": 1.5})
    table.measure("time", "b", lambda: 1 / 0)
    table.options.until = time.time() - 1.0
    assert table.measure("time", "c", lambda: {"ms": 3.0}) is None
    assert table.finish() == 1, "a row failed"
    found = _json(tmp_path)
    assert [(r["case"], r.get("failed", False)) for r in found["rows"] if r["group"] == "time"] == [
        ("a", False),
        ("b", True),
    ]
    assert "ZeroDivisionError" in table.of("time")[1]["remark"]
    assert found["left"] == ["time: c"]

    # A second call makes what failed and what was left, and nothing twice.
    table = _table(module, tmp_path)
    table.measure("time", "a", lambda: pytest.fail("made twice"))
    table.measure("time", "b", lambda: {"ms": 2.0})
    table.measure("time", "c", lambda: {"ms": 3.0})
    assert table.finish() == 0
    found = _json(tmp_path)
    times = {row["case"]: row["ms"] for row in found["rows"] if row["group"] == "time"}
    assert times == {"a": 1.5, "b": 2.0, "c": 3.0}
    assert found["left"] == []
    rivals = module("gpu_rivals").RIVALS
    rows = module("gpu_rows")
    (path,) = tmp_path.glob("*.json")
    told = rows.summary(path, table.run)
    # Rivals that are not here are looked for again, and count.
    assert told.endswith(f"0 left, 0 failed, in {path.with_suffix('.md')}")
    assert int(told.partition(" ")[0]) >= 2
    page = path.with_suffix(".md").read_text("utf-8")
    assert "| a | 1.5 |" in page
    for said in ("driver", "torch", "triton", "Absent:", "make gpu-toy"):
        assert said in page
    assert all(name in page.partition("Rivals here:")[2] for name in rivals)


def test_rows_of_other_kernels_or_machines_are_not_taken_over(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_key, gpu_rivals = module("gpu_key"), module("gpu_rivals")
    table = _table(module, tmp_path)
    table.measure("time", "a", lambda: {"ms": 1.0})
    table.measure("time", "b", lambda: {"ms": 2.0})
    assert _cases(_table(module, tmp_path)) == ["a", "b"]
    assert _cases(_table(module, tmp_path, "--again", "--rows", "time a")) == ["b"]
    others: dict[str, Callable[..., Any]] = {
        "sources": lambda: "00000000",
        "scripts": lambda name: "00000000",
        "machine": lambda: table.machine | {"driver": "580.1"},
    }
    for folder, (name, other) in enumerate(others.items()):
        before = _table(module, tmp_path / str(folder))
        before.measure("time", "a", lambda: {"ms": 1.0})
        with monkeypatch.context() as context:
            context.setattr(gpu_key, name, other)
            assert _cases(_table(module, tmp_path / str(folder))) == [], name
    before = _table(module, tmp_path / "rivals")
    before.measure("time", "a", lambda: {"ms": 1.0})
    version = gpu_rivals.version
    with monkeypatch.context() as context:
        newer = lambda name: "0.9" if name == "fla-core" else version(name)  # noqa: E731
        context.setattr(gpu_rivals, "version", newer)
        assert _cases(_table(module, tmp_path / "rivals")) == []
    kept = [path.stem for path in (tmp_path / "rivals").glob("*-until-*.json")]
    assert len(kept) == 1, "what was measured before is not written over"
    small = _table(module, tmp_path / "small")
    small.measure("time", "a", lambda: {"ms": 1.0})
    assert _cases(_table(module, tmp_path / "small", "--small")) == []
    # The interpreter's rows, on a machine that has the card as well.
    table = _table(module, tmp_path / "device")
    table.measure("time", "a", lambda: {"ms": 1.0})
    assert _cases(_table(module, tmp_path / "device", "--device", "cuda")) == []
    assert _cases(_table(module, tmp_path / "device", "--device", "cpu")) == []


def test_the_hash_of_scripts_is_that_of_what_measures_in_the_command(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = module("gpu_key")
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    for name in ("gpu_linear", "gpu_memory", "gpu_clock", "record"):
        (folder / f"{name}.py").write_text("")
    monkeypatch.setattr(key, "HERE", folder)
    monkeypatch.setattr(key, "ROOT", tmp_path)
    monkeypatch.setattr(key.record, "__file__", str(folder / "record.py"))
    before = key.scripts("gpu-linear")
    (folder / "gpu_memory.py").write_text("print()")
    assert key.scripts("gpu-linear") == before, "another command's script"
    for name in ("gpu_linear", "gpu_clock", "record"):
        (folder / f"{name}.py").write_text("print()")
        assert key.scripts("gpu-linear") != before, name
        before = key.scripts("gpu-linear")


def test_a_file_that_cannot_be_read_is_said_and_not_taken_over(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = _table(module, tmp_path)
    (path,) = tmp_path.glob("*.json")
    table.measure("time", "a", lambda: {"ms": 1.0})
    path.write_text(path.read_text("utf-8")[:100])
    assert _table(module, tmp_path).of("time") == []
    assert "cannot be read" in capsys.readouterr().out
    assert json.loads(path.read_text("utf-8"))["date"] == table.date


def test_a_fault_on_the_card_goes_on_in_a_new_process_and_memory_is_a_finding(
    tmp_path: Path,
) -> None:
    tries = tmp_path / "tries"
    tries.write_text("")
    toy = Path(__file__).with_name("gpu_toy_command.py")
    result = subprocess.run(
        [sys.executable, toy, "--out", tmp_path / "out"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TOY_TRIES": str(tries), "TOY_ROWS": "full,fault,fine"},
    )
    assert result.returncode == 1, result.stderr
    pids = dict(line.split() for line in tries.read_text().splitlines())
    assert pids["full"] == pids["fault"] != pids["fine"]
    rows = {row["case"]: row for row in _json(tmp_path / "out")["rows"] if row["group"] == "time"}
    assert rows["full"]["remark"] == "out of memory: tried to allocate 1 TiB"
    assert "failed" not in rows["full"]
    assert rows["fault"]["failed"]
    assert rows["fine"]["ms"] == 1.5


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain copy of what the commands need, beside packages that cannot be imported."""
    tree = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("xdist", "kernels", "launchers", "tests/gpu"):
        shutil.copytree(ROOT / part, tree / part, ignore=ignored)
    (tree / "tests" / "benchmarks").mkdir()
    shutil.copy(ROOT / "tests" / "benchmarks" / "record.py", tree / "tests" / "benchmarks")
    (tree / "absent").mkdir()
    for name in ABSENT:
        text = f"raise ModuleNotFoundError('{name} is not here', name='{name}')\n"
        (tree / "absent" / f"{name}.py").write_text(text)
    return tree


def _small(command: str, copy: Path) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, f"tests/gpu/gpu_{command}.py", "--device", "cpu", "--small"],
        cwd=copy,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": ".:kernels:launchers:absent", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # The copy's own folder: nothing of this tree took part.
    (path,) = (copy / "docs" / "benchmarks").glob(f"gpu-{command}-*.json")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    last = result.stdout.splitlines()[-1]
    rows = [row for row in found["rows"] if "run" in row]
    assert last == (
        f"gpu-{command}: {len(rows)} rows measured, 0 kept, 0 left, 0 failed, "
        f"in {path.with_suffix('.md')}"
    )
    assert found["commit"] == ""
    assert found["left"] == []
    assert found["finished"]
    assert not [row for row in found["rows"] if row.get("failed")]
    page = path.with_suffix(".md").read_text("utf-8")
    assert "fla-core (not installed)" in page
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["linear", "attention", "memory"])
def test_the_same_code_measures_in_the_interpreter(command: str, copy: Path) -> None:
    found = _small(command, copy)
    assert {"torch", "triton", "driver"} <= set(found["machine"])
    groups = {row["group"] for row in found["rows"]}
    assert {"linear": "time", "attention": "time", "memory": "million"}[command] in groups


@pytest.mark.slow
def test_errors_are_measured_from_a_plain_copy_without_optional_packages(copy: Path) -> None:
    found = _small("parity", copy)["rows"]
    rows = [row for row in found if row["group"] == "errors"]
    assert {row["case"].partition(",")[0] for row in rows} >= {"GLA", "KDA", "Mamba-2 (ssd)"}
    assert all(row["output"] <= 1e-5 and row["worst gradient"] <= 1e-5 for row in rows)
    bits = {row["case"] for row in found if row["group"] == "bits"}
    assert bits == {
        "linear, both directions merged, float32",
        "merge, float32",
        "cross entropy, float32",
    }
    sanitizer = {row["case"]: row["remark"] for row in found if row["group"] == "sanitizer"}
    assert set(sanitizer) == {"memcheck", "racecheck"}
