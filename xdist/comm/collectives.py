"""Process groups by torch.distributed, and the one primitive of all moves.

Every move is pairs of sends and receives of tensors whose shapes all ranks know, so nothing is
padded, and the operations used (isend, irecv) have kept their names from torch 2.11 to 2.15.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from xdist.comm import faults
from xdist.comm.keep import replayed, reserve
from xdist.comm.ledger import CONTROL, record
from xdist.comm.pending import Pending
from xdist.comm.recorder import RECORDER
from xdist.errors import ShapeError

Shape = tuple[int, ...]


class Imagined(ProcessGroup):
    """A group of `size` ranks that do not exist, of which this process plays `rank`.

    Exchanges are counted and end at once, what is received has its shape and no meaning, and
    `exchange_integers` answers as if every rank had sent this one's values. It needs no world and
    may live beside one: so a run counts in advance what any of its ranks will send.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]


def size_of(group: ProcessGroup | None) -> int:
    """How many ranks share `group`; None is one rank."""
    if isinstance(group, Imagined):
        return group.size()
    return 1 if group is None else dist.get_world_size(group)


def rank_of(group: ProcessGroup | None) -> int:
    """This process's rank in `group`; None is one rank."""
    if isinstance(group, Imagined):
        return group.rank()
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class _Buffers:
    """What the transfers read and write: copies on another device where the group does not carry
    the tensors' own (`carrier`), which `device` then names."""

    sends: dict[int, Tensor]
    receives: dict[int, Tensor]
    device: torch.device | None


def start_pairs(
    sends: Mapping[int, Tensor],
    receives: Mapping[int, tuple[Shape, torch.dtype]],
    group: ProcessGroup | None,
    *,
    move: str,
    device: torch.device | None = None,
) -> Pending[dict[int, Tensor]]:
    """Send one tensor to each rank of `sends`, receive one of known shape from each of `receives`.

    Ranks are those of `group`. A tensor for this rank itself is handed over without a copy, and
    empty tensors do not travel. Received tensors are contiguous and on `device` (None: the device
    of the tensors sent, else the CPU).

    Raises:
        PeerLost: on `wait()` or here, when a rank of the group died or hung.
    """
    me = rank_of(group)
    if device is None:
        device = next((tensor.device for tensor in sends.values()), torch.device("cpu"))
    kept = {me: sends[me]} if me in sends and me in receives else {}
    if group is None:
        return Pending.done(kept)
    arriving = {r: spec for r, spec in receives.items() if r != me}
    tape = replayed()
    if tape is not None and move != CONTROL:
        got = tape.take(move, arriving)
        _keep(_place(move, arriving), got)
        return Pending.done({**got, **kept})
    sent = {r: t.detach().contiguous() for r, t in sends.items() if r != me and t.numel()}
    where = carrier(device, group)
    buffers = _Buffers(
        {r: _on(where, t) for r, t in sent.items()},
        {
            r: torch.empty(shape, dtype=dtype, device=where)
            for r, (shape, dtype) in arriving.items()
        },
        None if where == device else device,
    )
    if isinstance(group, Imagined):
        return _imagined(buffers, kept, move, _place(move, arriving))
    noted, send_tags, receive_tags = RECORDER.begin(
        move,
        group,
        lambda: dist.get_process_group_ranks(group),
        {r: (tuple(t.shape), str(t.dtype)) for r, t in buffers.sends.items()},
        {r: (tuple(t.shape), str(t.dtype)) for r, t in buffers.receives.items() if t.numel()},
    )
    with naming_lost_peers(move, group):
        works = _post(buffers, group, send_tags, receive_tags)
    record(
        move,
        sum(t.nbytes for t in buffers.sends.values()),
        sum(t.nbytes for t in buffers.receives.values()),
    )

    place = _place(move, arriving)

    def finish() -> dict[int, Tensor]:
        RECORDER.wait(noted)
        with naming_lost_peers(move, group):
            for work in works:
                work.wait()
        RECORDER.end(noted)
        got = buffers.receives
        if buffers.device is not None:
            got = {r: _on(buffers.device, t) for r, t in got.items()}
        _keep(place, got)
        return {**got, **kept}

    return Pending(finish)


def _place(
    move: str, arriving: Mapping[int, tuple[Shape, torch.dtype]]
) -> dict[int, Tensor] | None:
    """Where what arrives is kept for a recompute, if it is."""
    return None if move == CONTROL else reserve(move, arriving)


def _keep(place: dict[int, Tensor] | None, got: Mapping[int, Tensor]) -> None:
    if place is not None:
        place.update(got)


def carrier(device: torch.device, group: ProcessGroup) -> torch.device:
    """Where the transfers of tensors on `device` read and write: there, or where `group` carries.

    NCCL carries no host memory, so what lies there crosses by the current card; gloo sends no CUDA
    memory, so what lies there crosses by the host. The meta device has no transfers: it gets host
    memory that nobody touches.
    """
    if device.type == "meta":
        return torch.device("cpu")
    if isinstance(group, Imagined):
        return device
    backends = dist.BackendConfig(dist.Backend(dist.get_backend_config(group)))
    carried = [
        kind
        for kind, backend in backends.get_device_backend_map().items()
        if (kind, backend) != ("cuda", "gloo")
    ]
    if device.type in carried or not carried:
        return device
    return torch.device("cpu" if "cpu" in carried else carried[0])


def _imagined(
    buffers: _Buffers, kept: dict[int, Tensor], move: str, place: dict[int, Tensor] | None
) -> Pending[dict[int, Tensor]]:
    """Nothing is posted: the bytes are counted, and what would arrive is there."""
    record(
        move,
        sum(t.nbytes for t in buffers.sends.values()),
        sum(t.nbytes for t in buffers.receives.values()),
    )
    got = buffers.receives
    if buffers.device is not None:
        got = {r: _on(buffers.device, t) for r, t in got.items()}
    _keep(place, got)
    return Pending.done({**got, **kept})


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """`tensor` on `device`; of the meta device, which holds no values, only the shape."""
    if "meta" in (device.type, tensor.device.type):
        return torch.empty_like(tensor, device=device)
    return tensor.to(device)


def _post(
    buffers: _Buffers,
    group: ProcessGroup,
    send_tags: Mapping[int, int],
    receive_tags: Mapping[int, int],
) -> list[dist.Work]:
    # By their tags, messages of calls that differ do not meet (gloo; NCCL has none): a rank then
    # waits, and is told, where it would go on with half a message.
    # Nearest rank first, so that no rank is everybody's first target. Receives go first: gloo
    # then writes arriving bytes straight into their buffer.
    size, me = size_of(group), rank_of(group)
    order = [(me + step) % size for step in range(1, size)]
    transfers = [
        dist.P2POp(dist.irecv, buffers.receives[r], group=group, group_peer=r, tag=receive_tags[r])
        for r in reversed(order)
        if r in buffers.receives and buffers.receives[r].numel()
    ]
    transfers += [
        dist.P2POp(dist.isend, buffers.sends[r], group=group, group_peer=r, tag=send_tags[r])
        for r in order
        if r in buffers.sends
    ]
    return list(dist.batch_isend_irecv(transfers)) if transfers else []


@contextmanager
def naming_lost_peers(move: str, group: ProcessGroup) -> Iterator[None]:
    """Turn a broken connection inside the block into PeerLost, with the lost rank's name."""
    try:
        yield
    except RuntimeError as error:
        if not faults.is_broken_connection(error):
            raise
        store = dist.distributed_c10d._get_default_store()
        scene = faults.Scene(
            store,
            dist.get_rank(),
            dist.get_world_size(),
            dist.get_process_group_ranks(group),
            _store_host(store),
            RECORDER.moves(),
        )
        raise faults.peer_lost(error, move, scene) from error


def _store_host(store: dist.Store) -> str:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store.host if isinstance(store, dist.TCPStore) else ""


def exchange_integers(values: Sequence[int], group: ProcessGroup | None) -> list[tuple[int, ...]]:
    """Every rank's `values` (int64, the same number on all ranks), by rank. Control bytes."""
    mine = torch.tensor(list(values), dtype=torch.int64)
    if group is None:
        return [tuple(values)]
    if isinstance(group, Imagined) or str(dist.get_backend(group)) == "fake":
        return [tuple(values)] * size_of(group)
    others = [r for r in range(size_of(group)) if r != rank_of(group)]
    spec = ((len(values),), torch.int64)
    got = start_pairs(
        dict.fromkeys(others, mine), dict.fromkeys(others, spec), group, move=CONTROL
    ).wait()
    got[rank_of(group)] = mine
    return [tuple(got[r].tolist()) for r in range(size_of(group))]


def barrier(group: ProcessGroup | None) -> None:
    """Wait until every rank of `group` is here. Control bytes."""
    exchange_integers([0], group)


def check_member(group: ProcessGroup | None) -> None:
    """Refuse a group this process does not belong to.

    Raises:
        ShapeError: torch's marker for a group of other ranks was given.
    """
    if group is not None and (not isinstance(group, ProcessGroup) or rank_of(group) < 0):
        raise ShapeError(
            "this process does not belong to the process group given",
            f"group {group!r}",
            "pass a group of mesh (mesh.sequence_group, ...), or None for one rank",
        )


# --- process groups: used by mesh.py -----------------------------------------------------------


def is_initialised() -> bool:
    """Whether this process has a default process group."""
    return dist.is_available() and dist.is_initialized()


def world() -> ProcessGroup | None:
    """The default process group; None where there is none or it holds one rank."""
    if not is_initialised() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def world_rank_and_size() -> tuple[int, int]:
    """Rank and size of the default process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if is_initialised() else (0, 1)


def group_of(ranks: Sequence[int], name: str) -> ProcessGroup:
    """The group of world ranks `ranks` (this one among them), made once for each `name`.

    Torch's own registry of groups is asked first, so that a second mesh makes no new groups.
    """
    description = f"xdist/{name}/{','.join(map(str, ranks))}"
    for group in dist.distributed_c10d._world.pg_map:
        if group.group_desc == description:
            return group
    # Only members call: the groups of one axis are disjoint, and every rank makes its own in the
    # same order.
    return dist.new_group(
        list(ranks),
        timeout=_world_timeout(),
        use_local_synchronization=True,
        group_desc=description,
        backend=None,
    )


def _world_timeout() -> timedelta | None:
    """The time limit of the default group's moves, which torch does not hand on to new groups."""
    group = dist.group.WORLD
    assert group is not None
    try:
        found: timedelta = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, RuntimeError):
        # A backend without one, e.g. that of a world that does not exist.
        return None
    return found


def boxed_size_and_rank(value: object) -> tuple[int, int] | None:
    """Size and rank of a process group as c10d's dispatcher carries it; None for anything else."""
    if isinstance(value, torch.ScriptObject) and str(value._type()).endswith("c10d.ProcessGroup"):
        group = ProcessGroup.unbox(value)
        return group.size(), group.rank()
    return None


def device_mesh_from(
    groups: Sequence[ProcessGroup], device_type: str, ranks: Tensor, names: Sequence[str]
) -> DeviceMesh:
    """A torch DeviceMesh over existing groups, one a dim of `ranks`; makes no new group."""
    return DeviceMesh.from_group(list(groups), device_type, mesh=ranks, mesh_dim_names=tuple(names))
