"""Each rank reads its slab of a volume and no byte more; what lies beside it other ranks hold."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

import xdist
from xdist.data.degrade import Degradation
from xdist.data.grid_loader import GridRequest, read_grids
from xdist.data.grid_store import GridStore
from xdist.data.nifti import write_nifti
from xdist.data.volume import Volume, prepare_volume
from xdist.errors import DataError
from xdist.testing import RankPool

# Uneven shares, fewer planes than 3 ranks, even shares; 64 KiB hold several planes of any dim.
SIZES = (31, 2, 1200)
RECIPE = Degradation(bias=0.3, noise=10.0, seed=1)
# Two int16 channels and one byte of classes.
VOXEL_BYTES = 5


def _stores(folder: Path) -> list[tuple[int, bool, str]]:
    """(dim, whether chunks end where shares do, path): volumes as `xdist prepare volume` cuts them
    by default, and by chunks that fill shares exactly (single planes, 100 where there are 1200)."""
    rng = np.random.default_rng(0)
    for name, high in (("a", 1000), ("b", 500)):
        values = rng.integers(-9, high, SIZES).astype(np.int16)
        write_nifti(folder / f"{name}.nii", values, np.eye(4))
    write_nifti(folder / "seg.nii", rng.integers(0, 3, SIZES).astype(np.uint8), np.eye(4))
    volume = Volume((folder / "a.nii", folder / "b.nii"), labels=folder / "seg.nii")
    found = []
    for dim in range(3):
        for exact in (False, True):
            thick = (1, 1, 100)[dim]
            chunk = [thick if d == dim else size for d, size in enumerate(SIZES)]
            path = folder / f"{dim}{exact}"
            prepare_volume([volume], path, chunk=chunk if exact else None, slab_dim=dim)
            found.append((dim, exact, str(path)))
    return found


def _slab_is_read(stores: list[tuple[int, bool, str]]) -> list[str]:
    """On one rank: what it reads beyond its slab, or otherwise than the others hold."""
    wrong = []
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    for dim, exact, path in stores:
        gshard = xdist.GridShard(mesh, SIZES, dim)
        split, name = GridStore(path).split("train"), f"dim {dim}, exact {exact}"
        try:
            batch = read_grids(split, GridRequest.whole(0, [0], SIZES), gshard, degrade=RECIPE)
        except DataError as error:
            # 2 planes for 3 ranks, before anything is read.
            told = "shares of (1, 1, 0)" in error.why and "shard dim 2 (1200 pos" in error.do
            if min(gshard.shares) or split.bytes_read or not told:
                wrong.append(f"{name}: {error}")
            continue
        if not min(gshard.shares):
            wrong.append(f"{name}: a rank without positions was not refused")
        read, every = split.bytes_read, VOXEL_BYTES * int(np.prod(SIZES))
        box = [(0, size) for size in SIZES]
        box[dim] = (gshard.start, gshard.stop)
        own = VOXEL_BYTES * int(np.prod(gshard.local_sizes))
        if read != (own if exact else split.box_bytes(0, box)) or not own <= read <= every:
            wrong.append(f"{name}: {read} bytes of {every}, the slab has {own}")
        if dim == 2 and not read < 0.7 * every:
            wrong.append(f"{name}: {read} bytes, nearly all of {every}")
        whole = GridStore(path).split("train")
        everywhere = [(0, size) for size in SIZES]
        image = torch.from_numpy(whole.image(0, everywhere, RECIPE))[None]
        labels = torch.from_numpy(whole.labels(0, everywhere))[None]
        if not torch.equal(batch.labels, gshard.scatter(labels)):
            wrong.append(f"{name}: other labels")
        # A plane on each side comes from the ranks beside: it is what the disk says.
        bounds = np.cumsum([0, *gshard.shares]).tolist()
        windows = [(max(0, a - 1), min(SIZES[dim], b + 1)) for a, b in itertools.pairwise(bounds)]
        start, stop = windows[gshard.rank]
        beside = gshard.window(batch.x, windows)
        if not torch.equal(beside, image.narrow(dim + 1, start, stop - start)):
            wrong.append(f"{name}: other values than the disk has")
    return wrong


def test_each_rank_reads_its_slab_alone(pool2: RankPool, pool3: RankPool, tmp_path: Path) -> None:
    """By the loader's own path, from stores that `prepare_volume` made."""
    stores = _stores(tmp_path)
    for pool in (pool2, pool3):
        for rank, wrong in enumerate(pool.run(_slab_is_read, stores)):
            assert not wrong, f"rank {rank}: " + "; ".join(wrong)
