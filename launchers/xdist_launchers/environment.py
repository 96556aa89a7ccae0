"""Which launchers left variables behind, and whether they agree. Imports no torch, reads no files.

A process whose launchers contradict each other would train alone, N times over, or wait for ranks
that never come: it is refused before anything is loaded, with the table of what was seen.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from xdist.errors import LaunchError
from xdist.rank import is_loopback

MARK = "XDIST_LAUNCHER"  # set by xdist's own launchers for each rank they start

# Rank and size as each launcher names them. The first of a pair may be absent.
_MPI = (
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPI (PMI)", "PMI_RANK", "PMI_SIZE"),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
_STEP = ("Slurm step", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
_JOB = ("Slurm job", "", "SLURM_NTASKS")
_RANK = ("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE")
_SHOWN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", MARK),
    *(name for claim in _MPI for name in claim[1:]),
    *("PMIX_RANK", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_STEP_ID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NODEID", "SLURMD_NODENAME"),
)
_ALONE = (
    "one process alone: `xdist launch local CONFIG --ranks 1`; all of them: "
    "`xdist launch slurm CONFIG`, `xdist launch mpi CONFIG`, or srun and mpirun as "
    "docs/launching.md shows; or unset the variables of a launcher that is not in use"
)


@dataclass(frozen=True)
class Claim:
    """What one launcher says of this process. `rank` is -1 where it says only how many there are.

    `of_process` is whether it started this very process: a Slurm job around it did not.
    """

    source: str
    rank: int
    size: int
    of_process: bool = True

    def __str__(self) -> str:
        who = f"rank {self.rank} of {self.size}" if self.rank >= 0 else f"{self.size} tasks"
        return f"{self.source} says {who}"


def claims(environ: Mapping[str, str]) -> list[Claim]:
    """What MPI and Slurm say; a launcher that started one process alone has nothing to say."""
    found = [_claim(environ, *names) for names in _MPI]
    step = _claim(environ, *_STEP) if _number(environ, "SLURM_STEP_ID") is not None else None
    if step is not None and "SLURM_PTY_PORT" in environ:
        # `srun --pty` gives a shell to the first task: what is typed there was not started by it.
        step = None
    elif step is None and (job := _claim(environ, *_JOB)) is not None:
        step = Claim(job.source, job.rank, job.size, of_process=False)
    return [claim for claim in (*found, step) if claim is not None and claim.size > 1]


def check(environ: Mapping[str, str] | None = None) -> None:
    """Refuse launchers that contradict each other about the rank in this process.

    Variables set by torchrun or by a launcher of xdist win over all others. RANK and WORLD_SIZE
    set by anyone else must be those of MPI, or without MPI those of the Slurm step.

    Raises:
        LaunchError: with the table of the variables seen, and which of them won.
    """
    given = os.environ if environ is None else environ
    if _trusted(given):
        return
    seen = claims(given)
    mine = _claim(given, *_RANK)
    if mine is None or mine.size == 1:
        if seen:
            raise _refusal(
                f"{seen[0]}, but this process would train as one rank alone",
                given,
                "RANK=0 WORLD_SIZE=1" if mine else "nobody set RANK and WORLD_SIZE: one rank alone",
                _ALONE,
            )
        return
    _check_agreement(mine, seen, given)
    _check_nodes(mine, seen, given)


def check_launcher(command: str, environ: Mapping[str, str] | None = None) -> None:
    """Refuse to start the ranks of a run in each of several copies of a launcher.

    Raises:
        LaunchError: srun or mpirun started this very launcher more than once.
    """
    given = os.environ if environ is None else environ
    for claim in claims(given):
        if claim.of_process:
            raise _refusal(
                f"{claim}: {claim.size} copies of `{command}` would each start all ranks",
                given,
                f"nobody: `{command}` starts its ranks by itself",
                "start it once: without srun and mpirun, or with `srun --ntasks=1`",
            )


def check_mpi(rank: int, size: int, wanted: int, environ: Mapping[str, str] | None = None) -> None:
    """Refuse MPI singletons: processes that an MPI of another kind started, each a world of one.

    Raises:
        LaunchError: `size`, the ranks that MPI knows, is 1 where more were started or `wanted`.
    """
    given = os.environ if environ is None else environ
    seen = claims(given)
    if size > 1 or (not seen and wanted == 1):
        return
    expected = seen[0] if seen else f"the config wants {wanted} ranks"
    raise _refusal(
        f"{expected}, but MPI says rank {rank} of {size}: mpi4py belongs to another MPI than the "
        "launcher",
        given,
        "mpi4py's MPI: each process is a world of one",
        "use the mpirun of the MPI that mpi4py loads (`python -m mpi4py --mpi-lib-version`), name "
        "it with mpi.program, or reinstall mpi4py for this MPI",
    )


def _trusted(given: Mapping[str, str]) -> bool:
    """Whether torchrun or a launcher of xdist gave this process its rank."""
    started = given.get(MARK, "slurm") != "slurm" or "TORCHELASTIC_RUN_ID" in given
    return started and _claim(given, *_RANK) is not None


def _check_agreement(mine: Claim, seen: list[Claim], given: Mapping[str, str]) -> None:
    mpi = [claim for claim in seen if not claim.source.startswith("Slurm")]
    # Under mpirun the Slurm step is that of its daemons, one a node.
    for claim in mpi or [claim for claim in seen if claim.of_process]:
        if (claim.rank, claim.size) != (mine.rank, mine.size):
            raise _refusal(
                f"launchers disagree: {mine}, {claim}",
                given,
                "RANK and WORLD_SIZE, by which xdist goes",
                "start the ranks with one launcher only, or unset the variables of the other; "
                "docs/launching.md lists who sets what",
            )


def _check_nodes(mine: Claim, seen: list[Claim], given: Mapping[str, str]) -> None:
    address = given.get("MASTER_ADDR", "")
    if not is_loopback(address):
        return
    if any(claim.source == _STEP[0] for claim in seen):
        nodes = _number(given, "SLURM_STEP_NUM_NODES") or _number(given, "SLURM_NNODES") or 1
        # Several slurmd of one host have names of their own: there the loopback is right.
        here = socket.gethostname().partition(".")[0]
        several = nodes > 1 and given.get("SLURMD_NODENAME", "").partition(".")[0] == here
    else:
        local = _number(given, "LOCAL_WORLD_SIZE")
        several = local is not None and local < mine.size
    if several:
        raise _refusal(
            f"ranks are on several nodes, but MASTER_ADDR={address} is each node's own loopback",
            given,
            f"MASTER_ADDR={address}",
            "set MASTER_ADDR to a name or address of rank 0's node that the others can reach; on "
            "one host, leave LOCAL_WORLD_SIZE out or set it to WORLD_SIZE",
        )


def _refusal(what: str, given: Mapping[str, str], won: str, do: str) -> LaunchError:
    return LaunchError(what, "\n".join(["variables seen:", *table(given), f"in force: {won}"]), do)


def table(given: Mapping[str, str]) -> list[str]:
    """The launchers' variables that are set, one a line."""
    lines = [f"  {name:<22} {given[name]}" for name in _SHOWN if given.get(name)]
    return lines or ["  (none)"]


def _claim(given: Mapping[str, str], source: str, rank: str, size: str) -> Claim | None:
    count = _number(given, size)
    if count is None or count < 1:
        return None
    number = _number(given, rank) if rank else None
    return Claim(source, -1 if number is None else number, count)


def _number(given: Mapping[str, str], name: str) -> int | None:
    """An integer variable; None when it is absent or something else. rank.py judges RANK's form."""
    text = given.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None
