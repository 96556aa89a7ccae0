"""Kernels compiled without a GPU: what a row's key depends on, what fails, and the whole table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xdist_kernels import ahead, ahead_table
from xdist_kernels.launch import AMPERE, HOPPER, Config, Launch

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "kernels"


def _kernel(source: str, **names: Any) -> Any:
    """What ahead reads of a kernel that Triton would compile."""
    name = source.split("(")[0].removeprefix("def ")
    fields = {"src": source, "__globals__": names, "__qualname__": name, "__name__": name}
    kernel = type("Kernel", (), {})()
    vars(kernel).update(fields, __module__="xdist_kernels.linear.triton")
    return kernel


def _launch(kernel: Any, **changed: Any) -> Launch:
    fields: dict[str, Any] = {
        "kernel": kernel,
        "programs": 3,
        "config": Config(4, 2),
        "signature": (("x", "*fp32"), ("BLOCK", "constexpr")),
        "constants": (("BLOCK", 64),),
        "aligned": frozenset({"x"}),
    }
    return Launch(**fields | changed)


SOURCE = "def scale(x, BLOCK):\n    return _half(x) * FACTOR\n"
HALF = "def _half(x):\n    return x / 2\n"


def _key(target: Any = HOPPER, source: str = SOURCE, half: str = HALF, **changed: Any) -> str:
    factor = type("constexpr", (), {"value": changed.pop("factor", 3)})()
    kernel = _kernel(source, _half=_kernel(half), FACTOR=factor)
    return ahead.key_of(_launch(kernel, **changed), target)


def test_a_key_holds_what_the_compiler_reads_and_nothing_else() -> None:
    key = _key()
    commented = SOURCE.replace("    return", "    # Why.\n\n    return")
    assert _key(source=commented) == key, "a comment is not compiled"
    assert _key(programs=77) == key, "a grid is not compiled"
    others = {
        _key(AMPERE),
        _key(source=SOURCE.replace("*", "+")),
        _key(half=HALF.replace("2", "4")),
        _key(factor=5),
        _key(config=Config(8, 2)),
        _key(config=Config(4, 3)),
        _key(signature=(("x", "*fp16"), ("BLOCK", "constexpr"))),
        _key(constants=(("BLOCK", 128),)),
        _key(aligned=frozenset()),
    }
    assert len(others) == 9
    assert key not in others


def _row(**changed: Any) -> dict[str, Any]:
    row = {"key": "0", "family": "linear", "case": "GLA", "kernel": "states", "target": "sm_80"}
    row |= {"warps": 4, "stages": 2, "shared_bytes": AMPERE.shared_bytes, "registers": 128}
    return row | {"spilled_bytes": 0, "matrix": "mma"} | changed


def test_a_kernel_that_needs_too_much_shared_memory_or_does_not_compile_fails() -> None:
    assert ahead.too_large(_row()) == ""
    assert ahead.too_large(_row(target="sm_90", shared_bytes=HOPPER.shared_bytes)) == ""
    over = ahead.too_large(_row(shared_bytes=AMPERE.shared_bytes + 1))
    assert over.startswith("states for sm_80 (GLA)")
    assert str(AMPERE.shared_bytes) in over
    assert ahead.too_large(_row(target="sm_90", shared_bytes=HOPPER.shared_bytes + 1))
    assert "bad type" in ahead.too_large(_row(error="bad type"))


def test_a_table_is_read_back_and_shows_each_kernel(tmp_path: Path) -> None:
    rows = [_row(key="a", case="KDA"), _row(key="b", target="sm_90", spilled_bytes=16)]
    ahead_table.write(tmp_path, rows, ahead.TARGETS)
    assert list(ahead_table.read(tmp_path).values()) == sorted(rows, key=lambda row: row["case"])
    page = (tmp_path / "compiled.md").read_text("utf-8")
    assert "| `states` | sm_80 | 1 | 4 | 163.0 | 128 | 0 | mma |" in page
    assert "| `states` | sm_90 | 1 | 4 | 163.0 | 128 | 1 | mma |" in page
    assert "| `states` | sm_90 | GLA | 4, 2 | 128 | 16 |" in page
    text = (tmp_path / "compiled.json").read_text("utf-8")
    (tmp_path / "compiled.json").write_text(text.replace('"triton": "', '"triton": "0.'))
    assert ahead_table.read(tmp_path) == {}, "another Triton compiles anew"


@pytest.mark.slow
def test_every_kernel_and_config_compiles_within_the_shared_memory_of_sm_80_and_sm_90() -> None:
    """The table holds a row for everything that any family's cases start today, keyed by what
    the compiler reads, all within the limits; some rows, spread over it, are compiled again."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "xdist_kernels.ahead", "--check", "--again", "6", "--out", TABLE],
        cwd=ROOT / "kernels",
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((TABLE / "compiled.json").read_text("utf-8"))["rows"]
    families = {"attention", "linear", "delta", "selective_scan", "conv", "merge", "cross_entropy"}
    assert {(row["family"], row["target"]) for row in rows} >= {
        (family, target) for family in families for target in ("sm_80", "sm_90")
    }
    limits = {"sm_80": 163 << 10, "sm_90": 227 << 10}
    assert all(row["shared_bytes"] <= limits[row["target"]] for row in rows)
    assert all({"registers", "spilled_bytes", "matrix"} <= set(row) for row in rows)
