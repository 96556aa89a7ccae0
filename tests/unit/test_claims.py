"""Every promise of docs/claims.toml is shown by something that exists and runs.

A claim holds `promise` (one sentence) and at least one of `tests` (ids; a test without its
parameters names all of them), `benchmark` ("docs/benchmarks/x.md#row": a row's first cell or a
heading) and `docs` ("docs/page.md", with "#heading" if wanted). The other half, that a claimed
test which is skipped or expected to fail is a failure when it runs, is in /conftest.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"promise", "tests", "benchmark", "docs"}
AVOIDED = {"skip", "skipif", "xfail"}


def _claims() -> list[dict]:
    return tomllib.loads((ROOT / "docs" / "claims.toml").read_text(encoding="utf-8"))["claim"]


def _hooks(config: pytest.Config) -> Any:
    """The root conftest.py as a module."""
    for plugin in config.pluginmanager.get_plugins():
        if getattr(plugin, "__file__", None) == str(ROOT / "conftest.py"):
            return plugin
    raise AssertionError("conftest.py at the root is not loaded: claims would not be enforced")


# Prints "id<TAB>marker,marker" of every test: the same collection in a process of its own.
_LISTER = """
import sys, pytest
class Lister:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            marks = ",".join(sorted({mark.name for mark in item.iter_markers()}))
            print(f"@{item.nodeid}\\t{marks}")
sys.exit(pytest.main(["--collect-only", "-q", *sys.argv[1:]], plugins=[Lister()]))
"""


def _collect(root: Path, *arguments: str) -> list[tuple[str, frozenset[str]]]:
    """(id, markers) of all tests under `root`, collected in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", _LISTER, *arguments],
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )
    # 5: everything was deselected, which is fine as the list is made before that.
    assert result.returncode in (0, 5), result.stdout[-4000:] + result.stderr[-2000:]
    rows = [line[1:].split("\t") for line in result.stdout.splitlines() if line.startswith("@")]
    return [(node, frozenset(filter(None, marks.split(",")))) for node, marks in rows]


@pytest.fixture(scope="module")
def collected(request: pytest.FixtureRequest) -> list[tuple[str, frozenset[str]]]:
    """All tests with their markers; taken from this run when it collected the whole tree."""
    config = request.config
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        return config.stash[_hooks(config).COLLECTED]
    return _collect(ROOT)


def _faults(
    claims: list[dict],
    collected: list[tuple[str, frozenset[str]]],
    matches: Callable[[str, str], bool],
) -> list[str]:
    """What is wrong with the claims, one line each."""
    faults = []
    for claim in claims:
        promise = claim.get("promise", "").strip()
        label = f"{promise[:70]!r}"
        if not promise or set(claim) - KEYS:
            faults.append(f"{label}: a claim has a promise and only the keys {sorted(KEYS)}")
        if not claim.get("tests") and not claim.get("benchmark") and not claim.get("docs"):
            faults.append(f"{label}: nothing shows it")
        for test in claim.get("tests", []):
            found = [marks for node, marks in collected if matches(test, node)]
            if not found:
                faults.append(f"{label}: {test} does not exist or was not collected")
            for marks in found:
                if marks & AVOIDED:
                    faults.append(f"{label}: {test} is marked {sorted(marks & AVOIDED)}")
                if "gpu" in marks:
                    faults.append(f"{label}: {test} runs neither in make test nor in test-slow")
    return faults


def _anchor(text: str) -> str:
    """A heading's anchor as the docs site makes it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text.strip().lower())).strip("-")


def _missing(reference: str, *, rows: bool) -> str | None:
    """Why "path#fragment" names nothing, or None. `rows`: a table row's first cell counts too."""
    page, _, fragment = reference.partition("#")
    path = ROOT / page
    if not path.is_file():
        return f"{page} does not exist"
    lines = path.read_text(encoding="utf-8").splitlines()
    names = {_anchor(line.lstrip("#")) for line in lines if line.startswith("#")}
    if rows:
        names |= {_anchor(line.split("|")[1]) for line in lines if line.startswith("|")}
    if fragment and _anchor(fragment) not in names:
        return f"{page} has no {fragment!r}"
    return None


def test_claimed_tests_exist_and_run(
    collected: list[tuple[str, frozenset[str]]], request: pytest.FixtureRequest
) -> None:
    faults = _faults(_claims(), collected, _hooks(request.config).matches)
    assert not faults, "\n".join(faults)


def test_claimed_pages_and_rows_exist() -> None:
    faults = [
        f"{claim['promise'][:70]!r}: {why}"
        for claim in _claims()
        for key in ("benchmark", "docs")
        if key in claim and (why := _missing(claim[key], rows=key == "benchmark"))
    ]
    assert not faults, "\n".join(faults)


def test_promises_are_made_once() -> None:
    promises = [claim["promise"] for claim in _claims()]
    assert len(promises) == len(set(promises))


def test_wrong_claims_are_found(request: pytest.FixtureRequest) -> None:
    matches = _hooks(request.config).matches
    collected = [
        ("tests/a.py::test_one[1]", frozenset({"parametrize"})),
        ("tests/a.py::test_one_more", frozenset({"skipif"})),
        ("tests/a.py::test_card", frozenset({"gpu"})),
    ]
    good = {"promise": "one", "tests": ["tests/a.py::test_one"]}
    assert not _faults([good], collected, matches)
    for wrong in (
        {"promise": "absent", "tests": ["tests/a.py::test_on"]},
        {"promise": "skipped", "tests": ["tests/a.py::test_one_more"]},
        {"promise": "no card here", "tests": ["tests/a.py::test_card"]},
        {"promise": "nothing shows it"},
        {"promise": "misspelt key", "test": ["tests/a.py::test_one"]},
        {"tests": ["tests/a.py::test_one"]},
    ):
        assert _faults([good, wrong], collected, matches), wrong
    assert _missing("docs/claims.md#no-such-heading", rows=False)
    assert _missing("docs/no-such-page.md", rows=False)


_PROBE = """
import pytest

def test_runs():
    pass

def test_stops_inside():
    pytest.skip("no reason at all")

@pytest.mark.xfail
def test_hopes():
    assert False

@pytest.mark.xfail
def test_passes_by_surprise():
    pass

@pytest.fixture
def absent():
    pytest.skip("a fixture that gives up")

def test_needs_absent(absent):
    pass

def test_not_claimed():
    pytest.skip("free to skip")
"""
_PROBE_CLAIMS = """
[[claim]]
promise = "probe"
tests = [
  "tests/test_probe.py::test_runs", "tests/test_probe.py::test_stops_inside",
  "tests/test_probe.py::test_hopes", "tests/test_probe.py::test_passes_by_surprise",
  "tests/test_probe.py::test_needs_absent",
]
"""


def test_a_claimed_test_that_gives_up_at_run_time_fails(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests" / "test_probe.py").write_text(_PROBE, encoding="utf-8")
    (tmp_path / "docs" / "claims.toml").write_text(_PROBE_CLAIMS, encoding="utf-8")
    (tmp_path / "conftest.py").write_bytes((ROOT / "conftest.py").read_bytes())
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "tests"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )
    assert result.returncode == 1
    assert "3 failed, 1 passed, 1 skipped, 1 error" in result.stdout, result.stdout
    assert "stands in docs/claims.toml and was skipped" in result.stdout
    assert len(_collect(tmp_path)) == 6
