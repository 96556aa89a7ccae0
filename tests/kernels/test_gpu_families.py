"""What `make gpu-parity` does before it measures: every family under a sanitizer, and its bits."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xdist_kernels import launch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module() -> Iterator[Callable[[str], Any]]:
    """Imports a file of tests/gpu by its name."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "benchmarks")]
    yield importlib.import_module
    sys.path[:] = before


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 30.0
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


def _gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    # A zombie runs nothing; whoever adopted it will read its code.
    return state == "Z"


def test_the_families_start_kernels_of_every_file(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kernels of the interpreter have no types to write down: which ones are started is enough.
    written = lambda kernel, *_: SimpleNamespace(kernel=kernel)  # noqa: E731
    monkeypatch.setattr(launch, "_written_down", written)
    families = module("gpu_families").families(40, "float32", "cpu", small=True)
    started = set()
    for call in families.values():
        with launch.recording(launch.HOPPER) as launches:
            call()
        assert launches
        started |= {Path(one.kernel.fn.__code__.co_filename).parent.name for one in launches}
    folders = (ROOT / "kernels" / "xdist_kernels").glob("*/triton*.py")
    assert started == {path.parent.name for path in folders}


def test_bits_that_change_and_holes_fail(module: Any) -> None:
    bits = module("gpu_families").bits
    made = torch.tensor([1.0, -0.0])
    assert "failed" not in bits(lambda: {"out": made, "loss": torch.tensor(2.0)}, 3)
    turns = iter(range(9))
    row = bits(lambda: {"out": made, "dq": made + (next(turns) == 2) * 1e-7}, 3)
    assert row["failed"]
    assert row["remark"] == "not the first run's bits: dq in 1"
    signs = iter((0.0, -0.0))
    assert bits(lambda: {"out": torch.tensor(next(signs))}, 2)["failed"], "as bytes"
    row = bits(lambda: {"out": torch.tensor([1.0, torch.nan])}, 2)
    assert row["failed"]
    assert row["remark"] == "not finite: out"
    assert not torch.are_deterministic_algorithms_enabled()


CLEAN = "family: GLA\nfamily done: GLA\nfamily: KDA\nfamily done: KDA\n"
OUTSIDE = """========= COMPUTE-SANITIZER
family: GLA
========= Invalid __global__ read of size 4 bytes
=========     at states_kernel+0x1c0 in triton_states.py:71
family done: GLA
========= ERROR SUMMARY: 3 errors
"""
RACE = "========= Error: Race reported between Write access at a+0x10 and Read access at a+0x20\n"


@pytest.mark.parametrize(
    ("text", "code", "late", "failed", "remark"),
    [
        (CLEAN + "========= ERROR SUMMARY: 0 errors\n", 0, False, False, ""),
        (OUTSIDE, 86, False, True, "Invalid __global__ read of size 4 bytes"),
        (RACE + CLEAN, 86, False, True, "Race reported"),
        (CLEAN + "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n",
         0, False, False, ""),
        (CLEAN + "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n",
         86, False, True, "see the report"),
        (CLEAN + "family: delta\n", None, True, False, "the time was up in delta"),
        (CLEAN + "family: delta\n", 139, False, True, "ended in delta, code 139"),
        (CLEAN + "family: delta\nfamily broke: delta\n", 1, False, True, "raised: delta"),
        ("========= Error: Device not supported\nfamily: GLA\nfamily broke: GLA\n", 1, False, False,
         "compute-sanitizer does not serve here: Error: Device not supported"),
        ("", 1, False, False, "compute-sanitizer does not serve here: no message"),
    ],
)  # fmt: skip
def test_a_report_is_read(
    module: Any, text: str, code: int | None, late: bool, failed: bool, remark: str
) -> None:
    row = module("gpu_sanitizer").judged(text, code, late=late)
    assert row.get("failed", False) == failed
    assert remark in row.get("remark", "")
    assert bool(remark) == ("remark" in row)


def test_the_tool_is_started_over_every_family_and_its_report_kept(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sanitizer = module("gpu_sanitizer")
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    seen = tmp_path / "seen.json"
    script = (
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"caching = os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']\n"
        f"json.dump([caching, *sys.argv[1:]], open({str(seen)!r}, 'w'))\n"
        f"print({OUTSIDE!r})\nsys.exit(86)\n"
    )
    tool.write_text(script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    at = sanitizer.program()
    assert at == str(tool)
    row = sanitizer.row("memcheck", at, "cuda", 9.0, tmp_path / "out", "gpu-parity")
    assert row["failed"]
    assert row["errors"] == 3
    assert "Invalid __global__" in (tmp_path / "out" / "gpu-parity-memcheck.log").read_text()
    caching, *arguments = json.loads(seen.read_text())
    assert caching == "1"
    assert arguments[arguments.index("--tool") + 1] == "memcheck"
    program = arguments.index(sys.executable)
    assert Path(arguments[program + 1]) == ROOT / "tests" / "gpu" / "gpu_families.py"
    told = ["--device", "cuda", "--seconds", "9", "--beside", str(os.getpid())]
    assert arguments[program + 2 :] == told
    row = sanitizer.row("memcheck", None, "cuda", 9.0, tmp_path, "gpu-parity")
    assert "not installed" in row["remark"]


@pytest.mark.slow
def test_the_program_under_the_tool_runs_every_family(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = module("gpu_families")
    # What the tools' rows start, here in two processes that share the families.
    row = families.ahead(("float32",), 20, "cpu", small=True, processes=2, seconds=200.0)
    assert row.pop("seconds") > 0
    assert row == {"processes": 2, "families": len(families.families(20, "", "cpu", small=True))}


def test_what_a_worker_starts_ends_with_it_however_it_is_ended(tmp_path: Path) -> None:
    """A worker that is killed ends nothing by itself: what it started sees that it is gone."""
    seen, ready = tmp_path / "seen", tmp_path / "ready"
    program = tmp_path / "program"
    # In place of families: it says who it is, and would run for a minute.
    program.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT / 'tests' / 'gpu')!r})\nimport gpu_families\n"
        "def families(*_, **__):\n"
        f"    Path({str(seen)!r}).write_text(str(os.getpid()))\n"
        f"    os.rename({str(seen)!r}, {str(ready)!r})\n"
        "    time.sleep(60)\n"
        "gpu_families.families = families\nsys.argv = sys.argv[1:]\ngpu_families.main()\n"
    )
    program.chmod(0o755)
    worker = subprocess.Popen(
        [
            sys.executable, "-c",
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'gpu')!r}); import gpu_families;"
            f"sys.executable = {str(program)!r};"
            "gpu_families.ahead(['float32'], 20, 'cpu', small=True, processes=1, seconds=60.0)",
        ]
    )  # fmt: skip
    _until(ready.exists)
    started = int(ready.read_text())
    worker.kill()
    worker.wait()
    _until(lambda: _gone(started))


def test_what_does_not_end_in_a_process_of_its_own_is_a_remark(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = module("gpu_families")
    monkeypatch.setattr(sys, "executable", "/bin/true")
    row = families.ahead(("float32",), 20, "cpu", small=True, processes=1, seconds=1.0)
    assert row["families"] == 0
    assert row["remark"].endswith("0 raised, 14 did not end")
