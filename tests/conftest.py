"""Fixtures for all tests: real ranks that stay alive for the session, and poisoned memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Triton decides when it is imported, also in the ranks that tests start. Tests compute on the CPU,
# so its kernels run in its interpreter; what needs a card is in tests/gpu, which pytest does not
# run.
os.environ.setdefault("TRITON_INTERPRET", "1")

from xdist.testing import RankPool, poisoned_empty

# Tests may run inside a job: what its launcher set is not for the runs that tests start.
_OF_JOBS = ("SLURM_", "SBATCH_", "PMI_", "PMIX_", "OMPI_", "MV2_")
for _name in [name for name in os.environ if name.startswith(_OF_JOBS)]:
    del os.environ[_name]


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    """A process group left in pytest's own process fails the test that left it, not later ones."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("this test left a default process group in pytest's process")


def _pool(world_size: int) -> Iterator[RankPool]:
    # The processes start with the first call, so an unused pool costs nothing.
    with RankPool(world_size) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool2() -> Iterator[RankPool]:
    """Two ranks. Send many cases in one call; functions must be module-level."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool3() -> Iterator[RankPool]:
    """Three ranks."""
    yield from _pool(3)


@pytest.fixture(scope="session")
def pool4() -> Iterator[RankPool]:
    """Four ranks."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def pool8() -> Iterator[RankPool]:
    """Eight ranks."""
    yield from _pool(8)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` comes filled with NaN, so that a hole in an output fails the test."""
    with poisoned_empty():
        yield
