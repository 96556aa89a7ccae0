"""Each rank reads its slab of a volume and the planes beside it, and no byte more."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

import xdist
from xdist.data.degrade import Degradation
from xdist.data.grid_box import part_box, require_share
from xdist.data.grid_store import GridStore
from xdist.data.grid_write import Contents, GridSet, write_grids
from xdist.errors import DataError
from xdist.testing import RankPool

SIZES = (7, 2, 6)  # uneven shares, fewer planes than ranks, even shares
RECIPE = Degradation(bias=0.3, noise=10.0, seed=1)


def _values() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 1000, (*SIZES, 2)).astype(np.int16)
    return image, rng.integers(0, 3, SIZES).astype(np.uint8)


def _write(folder: Path, dim: int) -> Path:
    """One volume whose chunks are planes across `dim`."""
    chunk = tuple(1 if d == dim else size for d, size in enumerate(SIZES))
    one = GridSet(SIZES, 1, "int16", [_values()], (5.0, 0.0), (0.5, 1.0), (999.0, 999.0))
    contents = Contents("volume", ("a", "b"), ("x", "y", "z"), [one], {"train": [0]}, chunk=chunk)
    return write_grids(folder / f"planes{dim}", contents).path


def _slab_is_read(stores: list[str]) -> list[str]:
    """On one rank: what it reads beyond its slab and halo, or otherwise than the others hold."""
    wrong = []
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    for (dim, path), halo in itertools.product(enumerate(stores), (0, 1, 3)):
        gshard = xdist.GridShard(mesh, SIZES, dim)
        split = GridStore(path).split("train")
        box = part_box(gshard, halo=halo)
        image = torch.from_numpy(split.image(0, box, RECIPE))[None]
        labels = torch.from_numpy(split.labels(0, box))[None]
        # Two int16 channels and one byte of classes a voxel.
        voxels = int(np.prod([stop - start for start, stop in box]))
        if split.bytes_read != 5 * voxels:
            wrong.append(f"dim {dim}, halo {halo}: {split.bytes_read} bytes, {voxels} voxels")
        whole = torch.from_numpy(
            GridStore(path).split("train").image(0, [(0, size) for size in SIZES], RECIPE)
        )[None]
        windows = [
            (max(0, a - halo), min(SIZES[dim], b + halo)) if b > a else (a, b)
            for r in range(gshard.size)
            for a, b in [(sum(gshard.shares[:r]), sum(gshard.shares[: r + 1]))]
        ]
        # What the neighbours hold is what the disk says.
        if not torch.equal(gshard.window(gshard.scatter(whole), windows), image):
            wrong.append(f"dim {dim}, halo {halo}: other values than the ranks beside hold")
        own = gshard.scatter(torch.from_numpy(_values()[1].astype(np.int64))[None])
        inner = labels.narrow(dim + 1, gshard.start - box[dim][0], gshard.shares[gshard.rank])
        if not torch.equal(inner, own):
            wrong.append(f"dim {dim}, halo {halo}: other labels")
    short = xdist.GridShard(mesh, SIZES, 1)
    try:
        require_share(short, 1)
    except DataError as error:
        if "shard dim 0 (7 positions)" not in error.do or mesh.sequence_size == 2:
            wrong.append(str(error))
    else:
        if mesh.sequence_size > 2:
            wrong.append("2 planes for 3 ranks were not refused")
    return wrong


def test_each_rank_reads_its_slab_and_halo_alone(
    pool2: RankPool, pool3: RankPool, tmp_path: Path
) -> None:
    stores = [str(_write(tmp_path, dim)) for dim in range(3)]
    for pool in (pool2, pool3):
        for rank, wrong in enumerate(pool.run(_slab_is_read, stores)):
            assert not wrong, f"rank {rank}: " + "; ".join(wrong)
