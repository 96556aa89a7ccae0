"""Fixtures of whole runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.end_to_end.forked import Ended, Helper


@pytest.fixture(scope="session")
def drive() -> Iterator[Callable[..., dict[str, Ended]]]:
    """`Helper.drive`: runs forked from one process, which loads torch once for the session."""
    with contextlib.closing(Helper()) as helper:
        yield helper.drive
