"""Settings of how ranks are started: the sections [launch], [slurm], [ray] and [mpi]."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from xdist.config_section import AUTO, Amount, Count, Section, setting


class Launch(Section):
    """How ranks are started."""

    ranks: Annotated[int | None, Field(ge=1), *AUTO] = setting(
        None, 'ranks of the run; "auto" is data x ring x ulysses (data "auto" counts as 1)'
    )
    max_restarts: Amount = setting(
        0, "restarts after a lost rank; none is made when no step was completed since the last"
    )
    init_timeout_s: Annotated[float, Field(gt=0)] = setting(
        300.0, "longest wait for all ranks to join, seconds"
    )


_Names = Annotated[str, Field(pattern=r"^[A-Za-z0-9._,-]*$")]


class Slurm(Section):
    """`xdist launch slurm`: the job it renders. One task a rank."""

    nodes: Count = setting(1, "nodes of the job; ranks are spread evenly over them")
    time_minutes: Count = setting(1440, "time limit of one job, minutes")
    signal_s: Annotated[int, Field(ge=10)] = setting(
        120, "seconds before the time limit at which the run saves, to be requeued"
    )
    requeue: bool = setting(True, "requeue the job after a save at the time limit, and resume")
    partition: _Names = setting("", 'partition; "" is the cluster\'s default')
    account: _Names = setting("", 'account; "" is the user\'s default')
    gpus_per_task: Annotated[int, Field(ge=0, le=1)] = setting(
        0, "cards of each rank, 1 or 0; 0 trains on the CPU"
    )
    cpus_per_task: Count = setting(1, "CPU cores of each rank")
    memory: Annotated[str, Field(pattern=r"^([0-9]+[KMGT]?)?$")] = setting(
        "", 'memory of a node as Slurm writes it, e.g. "64G"; "" is the default'
    )
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{0,15}$")] = setting(
        "", 'network interface of the rendezvous, e.g. "ib0"; "" is that of the first node\'s name'
    )
    modules: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/+-]*$")], ...] = setting(
        (), "environment modules to load, in order"
    )
    container: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")] = setting(
        "",
        'command put before each rank, e.g. "apptainer exec --nv image.sif"; its words are '
        'separated as a shell does, and nothing in them is expanded; "" for none',
    )
    options: tuple[
        Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[^'\\\x00-\x1f\x7f]+)?$")], ...
    ] = setting((), 'further sbatch options, one an item, e.g. ["--qos=long", "--exclusive"]')


class Ray(Section):
    """`xdist launch ray`: one actor a rank, in a placement group."""

    address: str = setting(
        "", 'HOST:PORT of a running cluster; "" starts a private one on this host and ends it'
    )
    cpus_per_rank: Count = setting(1, "CPU cores of each actor")
    gpus_per_rank: Amount = setting(0, "cards of each actor; 0 trains on the CPU")
    prepare: bool = setting(
        False, "prepare data.store from ray.sources as Ray tasks before training"
    )
    sources: tuple[str, ...] = setting((), "text files and folders that ray.prepare reads")
    heartbeat_s: Annotated[float, Field(gt=0)] = setting(
        10.0, "silence after which an actor or its node counts as lost, seconds"
    )


class Mpi(Section):
    """`xdist launch mpi`: ranks started by mpirun."""

    program: str = setting("mpirun", "mpirun to use, a name or a path")
    hosts: tuple[str, ...] = setting((), 'hosts with their slots, e.g. ["n0:4", "n1:4"]')
    options: tuple[str, ...] = setting((), "further options of mpirun, one an item")
