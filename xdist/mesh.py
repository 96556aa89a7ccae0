"""Degrees to a validated, named mesh of ranks.

Axes are named `data`, `ring` and `ulysses`, from the slowest to the fastest world rank; ring x
ulysses are the sequence ranks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from xdist.comm import collectives, worlds
from xdist.comm.collectives import DeviceMesh, ProcessGroup
from xdist.console import say
from xdist.errors import GeometryError
from xdist.rank import RankVariables, read_rank

AXES = ("data", "ring", "ulysses")


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. Groups are None where the degree is 1.

    `parameter_group` spans data x sequence: the ranks that hold the same weights. `device_mesh` is
    torch's view of the same groups with axes data, ring, ulysses; None where there is no process
    group.
    """

    data_size: int
    ring_size: int
    ulysses_size: int
    world_rank: int
    device: torch.device
    data_group: ProcessGroup | None = field(default=None, repr=False)
    ring_group: ProcessGroup | None = field(default=None, repr=False)
    ulysses_group: ProcessGroup | None = field(default=None, repr=False)
    sequence_group: ProcessGroup | None = field(default=None, repr=False)
    parameter_group: ProcessGroup | None = field(default=None, repr=False)
    device_mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, object]) -> Mesh:
        # Process groups cannot be copied: a copy of a module stands on the same ranks.
        return self

    @property
    def world_size(self) -> int:
        """data x ring x ulysses."""
        return self.data_size * self.sequence_size

    @property
    def sequence_size(self) -> int:
        """How many ranks share one sequence: ring x ulysses."""
        return self.ring_size * self.ulysses_size

    @property
    def sequence_rank(self) -> int:
        """ring_rank * ulysses + ulysses_rank."""
        return self.world_rank % self.sequence_size

    @property
    def data_rank(self) -> int:
        """Which of the data-parallel replicas this rank serves."""
        return self.world_rank // self.sequence_size

    @property
    def ring_rank(self) -> int:
        """This rank's place on the ring axis."""
        return self.sequence_rank // self.ulysses_size

    @property
    def ulysses_rank(self) -> int:
        """This rank's place on the ulysses axis."""
        return self.sequence_rank % self.ulysses_size

    @classmethod
    def one_rank(cls, device: torch.device | str = "cpu") -> Mesh:
        """The mesh of a single rank, whatever process group exists: every move is the identity."""
        return cls(1, 1, 1, 0, torch.device(device))

    @classmethod
    def imagined(
        cls, rank: int, *, data: int = 1, ring: int = 1, ulysses: int = 1,
        device: torch.device | str = "meta",
    ) -> Mesh:  # fmt: skip
        """The mesh that `rank` of data x ring x ulysses ranks would have, none of which exists.

        Moves over it are counted by the ledger and carry nothing (`comm.collectives.Imagined`).
        """
        sequence = ring * ulysses

        def group(place: int, size: int) -> ProcessGroup | None:
            return collectives.Imagined(place, size) if size > 1 else None

        return cls(
            data,
            ring,
            ulysses,
            rank,
            torch.device(device),
            data_group=group(rank // sequence, data),
            ring_group=group(rank % sequence // ulysses, ring),
            ulysses_group=group(rank % ulysses, ulysses),
            sequence_group=group(rank % sequence, sequence),
            parameter_group=group(rank, data * sequence),
        )

    @classmethod
    def from_device_mesh(
        cls,
        device_mesh: DeviceMesh,
        *,
        data: str | None = None,
        ring: str | None = None,
        ulysses: str | None = None,
    ) -> Mesh:
        """A mesh over an existing torch DeviceMesh that spans the world.

        `data`, `ring` and `ulysses` are names of its dims; a name left out is degree 1. World ranks
        must run along data, ring, ulysses in this order, the last fastest.

        Raises:
            GeometryError: a name is unknown, a dim is left over, or the ranks are in another order.
        """
        names = device_mesh.mesh_dim_names or ()
        chosen = [name for name in (data, ring, ulysses) if name is not None]
        if sorted(chosen) != sorted(names):
            raise GeometryError(
                "every dim of the device mesh needs one of the roles data, ring, ulysses",
                f"its dims are {list(names)}, named were {chosen}",
                "name each dim once",
            )
        sizes = tuple(
            1 if n is None else device_mesh.size(names.index(n)) for n in (data, ring, ulysses)
        )
        ranks = device_mesh.mesh.permute([names.index(name) for name in chosen]).flatten()
        if ranks.tolist() != list(range(collectives.world_rank_and_size()[1])):
            raise GeometryError(
                "the device mesh must hold the world's ranks in order, data slowest, then ring",
                f"in that order its ranks are {ranks.tolist()}",
                "make it with init_device_mesh over (data, ring, ulysses), or use xdist.init_mesh",
            )
        device = _device(device_mesh.device_type, read_rank().local_rank)
        return _build((sizes[0], sizes[1], sizes[2]), device, device_mesh)


def init_mesh(
    *,
    data: int | None = None,
    ring: int = 1,
    ulysses: int = 1,
    device: torch.device | str | None = None,
    timeout_s: float = 600,
    join_timeout_s: float | None = None,
    settings: str = "",
) -> Mesh:
    """The mesh of this job: `data` x `ring` x `ulysses` ranks.

    `data=None` is world / (ring x ulysses). Without torchrun's variables the world is one rank.
    An initialised process group is used, never replaced; a second call with the same degrees gives
    an equal mesh. `device=None` is this rank's CUDA card if the machine has one, else the CPU;
    CUDA uses NCCL, the CPU gloo. `timeout_s` (seconds) bounds every move, `join_timeout_s` meeting
    (None: the same). `settings`, one `key = value` a line, must be equal on all ranks.

    Raises:
        GeometryError: the product of the degrees is not the world.
        LaunchError: the launcher's variables contradict each other, the ranks do not meet, or one
            of them is of another job or has other settings.
    """
    variables = read_rank()
    initialised = collectives.is_initialised()
    world = collectives.world_rank_and_size()[1] if initialised else variables.world_size
    sizes = _degrees(world, data, ring, ulysses)
    chosen = _device(device, variables.local_rank)
    if not initialised and world > 1:
        backend = _backend(chosen, variables)
        worlds.initialise(
            backend,
            variables,
            settings=settings,
            timeout_s=timeout_s,
            join_timeout_s=timeout_s if join_timeout_s is None else join_timeout_s,
            device=chosen,
        )
    elif initialised:
        worlds.sign_in()
    return _build(sizes, chosen, None)


def _degrees(world: int, data: int | None, ring: int, ulysses: int) -> tuple[int, int, int]:
    for name, degree in (("data", data), ("ring", ring), ("ulysses", ulysses)):
        if degree is not None and (isinstance(degree, bool) or not isinstance(degree, int)):
            raise GeometryError(f"{name} must be an integer", f"got {degree!r}")
        if degree is not None and degree < 1:
            raise GeometryError(f"{name} must be at least 1", f"got {degree}")
    sequence = ring * ulysses
    rest = world // sequence if data is None else data
    if rest * sequence == world:
        return rest, ring, ulysses
    said = "world / (ring x ulysses)" if data is None else data
    raise GeometryError(
        f"data x ring x ulysses is not the number of ranks: {said} x {ring} x {ulysses} != {world}",
        f"ring x ulysses = {sequence}, the world has {world} rank{'s' * (world != 1)}",
        "valid settings near it: " + "; ".join(_nearest(world, data, ring, ulysses)),
    )


def _nearest(world: int, data: int | None, ring: int, ulysses: int) -> list[str]:
    wanted = (data or max(1, world // (ring * ulysses)), ring, ulysses)
    valid = [
        (d, r, world // (d * r))
        for d in range(1, world + 1)
        if world % d == 0
        for r in range(1, world // d + 1)
        if (world // d) % r == 0
    ]
    valid.sort(
        key=lambda sizes: (sum(abs(a - b) for a, b in zip(sizes, wanted, strict=True)), sizes)
    )
    found = [f"data={d} ring={r} ulysses={u} on {world}" for d, r, u in valid[:2]]
    needed = (data or 1) * ring * ulysses
    return [*found, f"{needed} rank{'s' * (needed != 1)} for the degrees given"]


def _device(device: torch.device | str | None, local_rank: int) -> torch.device:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None:
        # More ranks than cards share them (gloo carries CUDA tensors through the host).
        chosen = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def _backend(device: torch.device, variables: RankVariables) -> str:
    if device.type != "cuda":
        return "gloo"
    cards = torch.cuda.device_count()
    if variables.local_world_size <= cards:
        return "nccl"
    if variables.rank == 0:
        say(
            f"xdist: {variables.local_world_size} ranks share {cards} card(s), which NCCL refuses: "
            "moves go through host memory (gloo)",
            sys.stderr,
        )
    return "gloo"


def _build(
    sizes: tuple[int, int, int], device: torch.device, device_mesh: DeviceMesh | None
) -> Mesh:
    """Groups and mesh. Every rank makes its own groups, in the same order of axes."""
    rank, world = collectives.world_rank_and_size()
    if not collectives.is_initialised():
        return Mesh(*sizes, rank, device)
    ranks = torch.arange(world).reshape(sizes)
    place = [int(index) for index in (ranks == rank).nonzero()[0]]
    along = []
    for axis, name in enumerate(AXES):
        at: list[int | slice] = list(place)
        at[axis] = slice(None)
        along.append(collectives.group_of(ranks[tuple(at)].tolist(), name))
    sequence = collectives.group_of(ranks[place[0]].flatten().tolist(), "sequence")
    if device_mesh is None:
        device_mesh = collectives.device_mesh_from(along, device.type, ranks, AXES)
    data, ring, ulysses = (
        group if size > 1 else None for group, size in zip(along, sizes, strict=True)
    )
    return Mesh(
        *sizes,
        rank,
        device,
        data_group=data,
        ring_group=ring,
        ulysses_group=ulysses,
        sequence_group=sequence if sizes[1] * sizes[2] > 1 else None,
        parameter_group=collectives.world(),
        device_mesh=device_mesh,
    )
