"""Claims are enforced where tests run: a claimed test that does not run is a failure.

`docs/claims.toml` promises things and names the tests that show them. A test that is skipped or
expected to fail shows nothing, so for claimed tests both outcomes are turned into failures here,
in every run (`make test`, `make test-slow`, one file). That the ids exist, and are selected by
one of the two commands, is checked by tests/unit/test_claims.py from the list collected here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Generator
from pathlib import Path

import pytest

CLAIMS = Path(__file__).resolve().parent / "docs" / "claims.toml"
# (node id, marker names) of every collected test, before any is deselected.
COLLECTED = pytest.StashKey[list[tuple[str, frozenset[str]]]]()
CLAIMED = pytest.StashKey[frozenset[str]]()


def matches(claimed: str, node_id: str) -> bool:
    """Whether a collected test is what a claim names: itself, or one of its parameters."""
    return node_id == claimed or node_id.startswith((f"{claimed}[", f"{claimed}::"))


def read_claims(path: Path = CLAIMS) -> list[dict]:
    """All claims; an absent file has none."""
    if not path.exists():
        return []
    return tomllib.loads(path.read_text(encoding="utf-8")).get("claim", [])


def pytest_configure(config: pytest.Config) -> None:
    claimed = frozenset(test for claim in read_claims() for test in claim.get("tests", []))
    config.stash[CLAIMED] = claimed
    config.stash[COLLECTED] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = [
        (item.nodeid, frozenset(mark.name for mark in item.iter_markers())) for item in items
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    avoided = report.outcome == "skipped" or hasattr(report, "wasxfail")
    if avoided and any(matches(claim, item.nodeid) for claim in item.config.stash[CLAIMED]):
        report.outcome = "failed"
        how = "expected to fail" if hasattr(report, "wasxfail") else "skipped"
        report.__dict__.pop("wasxfail", None)
        report.longrepr = f"{item.nodeid} stands in docs/claims.toml and was {how}"
    return report
