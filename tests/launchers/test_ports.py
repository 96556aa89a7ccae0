"""Failure 5: the chosen port is taken before rank 0 listens. Ports are really occupied."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.launchers.conftest import PATHS
from tests.launchers.runs import Small
from xdist.comm.sockets import listen

# `xdist launch local`, with the ports it will choose given.
LAUNCH = """
import sys
from xdist_launchers import local
from xdist_launchers.job import local_job
ports = iter(map(int, sys.argv[1].split(",")))
local.free_port = lambda: next(ports)
sys.exit(local.run(local_job(sys.argv[2], sys.argv[3:])))
"""


def _launch(small: Small, ports: list[int]) -> subprocess.CompletedProcess[str]:
    listed = ",".join(map(str, ports))
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, listed, *small.words("run")],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_failure_5_a_taken_port_is_replaced_and_the_run_goes_on(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path, steps=2)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with listen("127.0.0.1", 0) as free:
            other = free.getsockname()[1]
        done = _launch(small, [port, other])
    assert done.returncode == 0, done.stderr
    assert f"port {port} of 127.0.0.1 is taken on host" in done.stderr
    assert "trying another port (2 of 3)" in done.stderr
    assert len(small.losses()) == 2


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_failure_5_three_taken_ports_end_with_3(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path, steps=2)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = _launch(small, [port] * 3)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("trying another port") == 2
    assert f"xdist: port {port} of 127.0.0.1 is taken on host {os.uname().nodename}" in done.stderr
    assert small.status()["exit_code"] == 3
