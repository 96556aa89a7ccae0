"""While a run trains on one host, xdist listens on loopback only; its files are its owner's."""

from __future__ import annotations

import pathlib
import signal
import stat

import psutil
import pytest

from tests.launchers.conftest import wait_until
from tests.launchers.runs import Small
from tests.launchers.test_cli import XDIST, xdist
from tests.launchers.test_mpi import start

OWN = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def _listening(pid: int) -> tuple[set[str], int]:
    """Addresses on which a launcher and its ranks listen, and how many processes they are.

    mpirun is left out: Open MPI's listens on all interfaces, and no setting of its own ends that.
    """
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    family = [process for process in family if process.name() not in ("mpirun", "prterun")]
    found = [
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        or (connection.type == 2 and not connection.raddr)
    ]
    return set(found), len(family)


@pytest.mark.timeout(250)
def test_a_local_run_listens_on_loopback_only_and_its_files_are_private(
    tmp_path: pathlib.Path,
) -> None:
    small = Small.make(tmp_path, 5000)
    more = ("checkpoint.every_steps=2", "log.tensorboard=true")
    process = start(*XDIST, "launch", "local", *small.words("run", *more))
    metrics = small.run() / "metrics.jsonl"
    wait_until(
        lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 2000),
        150,
    )
    assert process.poll() is None, process.communicate()[0]
    addresses, processes = _listening(process.pid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert processes >= 3
    assert addresses
    assert addresses <= OWN

    assert xdist("report", str(small.run())).returncode == 0
    entries = [small.run(), *small.run().rglob("*")]
    names = {entry.name for entry in entries}
    assert {"metrics.jsonl", "status.json", "config.toml", "run.json", "report.html"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {"rank-1.log", "checkpoints", "tensorboard"} <= names
    modes = {
        str(entry.relative_to(small.folder)): oct(stat.S_IMODE(entry.stat().st_mode))
        for entry in entries
    }
    wrong = {
        name: mode
        for name, mode in modes.items()
        if mode != ("0o700" if (small.folder / name).is_dir() else "0o600")
    }
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_an_mpi_run_of_one_host_listens_on_loopback_only(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path, 5000)
    process = start(*XDIST, "launch", "mpi", *small.words())
    metrics = small.run() / "metrics.jsonl"
    wait_until(
        lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 2000),
        150,
    )
    assert process.poll() is None, process.communicate()[0]
    addresses, processes = _listening(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert processes >= 3
    assert addresses
    assert addresses <= OWN
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (small.run() / "logs").iterdir()}
    assert modes == {0o600}
