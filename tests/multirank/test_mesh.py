"""Meshes on real ranks: places, groups, equality, and what contradicts itself."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import xdist
from xdist import comm
from xdist.comm import collectives
from xdist.errors import GeometryError
from xdist.mesh import Mesh
from xdist.testing import RankPool

DEGREES = [(1, 4, 1), (1, 1, 4), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (None, 2, 1)]


def _sum_over(group: object, value: int) -> int:
    return int(comm.start_reduce(torch.tensor(value), group).wait())  # type: ignore[arg-type]


def _groups_known() -> int:
    import torch.distributed as dist

    return len(dist.distributed_c10d._world.pg_map)


def _places() -> list[tuple]:
    found = []
    for data, ring, ulysses in DEGREES:
        mesh = xdist.init_mesh(data=data, ring=ring, ulysses=ulysses, device="cpu")
        known = _groups_known()
        again = xdist.init_mesh(data=data, ring=ring, ulysses=ulysses, device="cpu")
        assert again == mesh
        assert _groups_known() == known, "a second mesh made new groups"
        assert mesh.sequence_rank == mesh.ring_rank * ulysses + mesh.ulysses_rank
        assert mesh.world_rank == mesh.data_rank * mesh.sequence_size + mesh.sequence_rank
        for size, group in (
            (mesh.data_size, mesh.data_group),
            (ring, mesh.ring_group),
            (ulysses, mesh.ulysses_group),
            (mesh.sequence_size, mesh.sequence_group),
            (4, mesh.parameter_group),
        ):
            assert (group is None) == (size == 1)
            assert collectives.size_of(group) == size
        assert mesh.device_mesh is not None
        assert tuple(mesh.device_mesh.mesh.shape) == (mesh.data_size, ring, ulysses)
        view = Mesh.from_device_mesh(mesh.device_mesh, data="data", ring="ring", ulysses="ulysses")
        assert view == mesh
        bit = 1 << mesh.world_rank
        found.append((_sum_over(mesh.sequence_group, bit), _sum_over(mesh.data_group, bit)))
    return found


def test_groups_span_the_axes_they_are_named_for(pool4: RankPool) -> None:
    results = pool4.run(_places)
    for number, (data, ring, ulysses) in enumerate(DEGREES):
        sequence = ring * ulysses
        for rank in range(4):
            mates = [r for r in range(4) if r // sequence == rank // sequence]
            replicas = [r for r in range(4) if r % sequence == rank % sequence]
            assert results[rank][number] == (
                sum(1 << r for r in mates),
                sum(1 << r for r in replicas),
            ), (data, ring, ulysses)


def _from_torch() -> tuple[int, int, int]:
    outer = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "context"))
    mesh = Mesh.from_device_mesh(outer, data="replica", ulysses="context")
    assert mesh.device_mesh is outer
    with pytest.raises(GeometryError, match="roles"):
        Mesh.from_device_mesh(outer, data="replica")
    with pytest.raises(GeometryError, match="in order"):
        Mesh.from_device_mesh(outer, data="context", ring="replica")
    total = _sum_over(mesh.sequence_group, mesh.world_rank)
    return mesh.data_rank, mesh.sequence_rank, total


def test_a_device_mesh_of_torch_can_be_used(pool4: RankPool) -> None:
    assert pool4.run(_from_torch) == [(0, 0, 1), (0, 1, 1), (1, 0, 5), (1, 1, 5)]


def _wrong_degrees() -> str:
    with pytest.raises(GeometryError) as caught:
        xdist.init_mesh(data=1, ring=3, device="cpu")
    return str(caught.value)


def test_wrong_degrees_show_the_arithmetic_and_what_would_do(pool4: RankPool) -> None:
    messages = set(pool4.run(_wrong_degrees))
    assert len(messages) == 1
    message = messages.pop()
    assert "1 x 3 x 1 != 4" in message
    assert "data=1 ring=4 ulysses=1 on 4" in message
    assert "3 ranks for the degrees given" in message
