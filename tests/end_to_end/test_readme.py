"""What the README shows is run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_library_example_prints_no_difference(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 1
    script = tmp_path / "example.py"
    script.write_text(blocks[0], encoding="utf-8")
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "launchers"))
    result = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    found = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", result.stdout.partition(":")[2])]
    assert len(found) == 2
    assert all(error < 1e-5 for error in found), result.stdout


def test_every_make_target_in_the_docs_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    rules = re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pattern = re.compile(r"(?:^|`)make ([a-z][a-z-]*)", re.MULTILINE)
    named = {name for page in pages for name in pattern.findall(page.read_text("utf-8"))}
    assert {"quickstart", "test"} <= named
    assert named <= targets, f"the docs name make {sorted(named - targets)}"


def test_every_dependency_is_pinned_and_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    names = {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in wanted}
    pins = (ROOT / "constraints.txt").read_text("utf-8").lower().replace("_", "-")
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    for name in names:
        assert re.search(rf"^{name}==\d", pins, re.MULTILINE), f"constraints.txt lacks {name}"
        assert name in page, f"docs/dependencies.md gives no reason for {name}"
