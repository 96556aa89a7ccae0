"""Training on grids: volumes with a class at each position, or video under noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from xdist.config import Config
from xdist.data import Degradation, GridBatch, GridRequest, GridSplit, GridStore
from xdist.data.grid_loader import KNOWN, read_grids
from xdist.data.read_ahead import ReadAhead
from xdist.errors import DataError
from xdist.grid_shard import GridShard
from xdist.mesh import Mesh
from xdist.models.grid_config import DTYPES
from xdist.models.vdt_inputs import diffusion_inputs
from xdist.train import setup
from xdist.train.agree import share_json_rows
from xdist.train.engines.protocol import Engine
from xdist.train.evaluate_grids import GridEvaluation, evaluate_grids
from xdist.train.feed import Feed, draws_of
from xdist.train.resume import Position


class GridWork:
    """`Workload` of `data.kind = "volume"` and `"video"`.

    Every rank of a sequence group makes it at the same time: its shard is compared.

    Raises:
        DataError: no store there, or one of another kind, or samples that are not those of the
            config.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        # First, as it exchanges: what may fail on one rank alone comes behind it.
        self.shard = GridShard(mesh, config.model.sizes, config.parallel.dim)
        self._config, self._mesh = config, mesh
        data = config.data
        recipe = Degradation(bias=data.bias, noise=data.noise, seed=data.degrade_seed)
        self.degrade = recipe if data.bias or data.noise else None
        self.store = GridStore(data.store)
        _check_kind(config, self.store)
        for split in (self.trained, self.held_out):
            _check_split(config, split)

    @property
    def trained(self) -> GridSplit:
        """What is trained on: no class inside `data.slab`."""
        split, slab = self.store.split("train"), self._config.data.slab
        return split.without((slab[0], slab[1], slab[2])) if slab else split

    @property
    def held_out(self) -> GridSplit:
        """What is evaluated: the classes of `data.slab` alone, or another split."""
        data = self._config.data
        if not data.slab:
            return self.store.split(data.held_out)
        return self.store.split("train").only((data.slab[0], data.slab[1], data.slab[2]))

    @property
    def labelled(self) -> bool:
        """Whether positions have classes."""
        return self._config.data.kind == "volume"

    @property
    def identity(self) -> dict[str, Any]:
        """Of the store, and of what is done to its images."""
        return self.store.identity_of(self.degrade)

    @property
    def measure(self) -> str:
        """Bits a position, or the mean squared error of the noise."""
        return "bits/position" if self.labelled else "squared error"

    def feed(self, position: Position) -> Feed:
        """Reads this rank's parts ahead."""
        return Feed(
            self._config,
            position,
            ReadAhead(self._batches(position.copy()), self._config.data.prefetch),
        )

    def _batches(self, position: Position) -> Iterator[GridBatch]:
        config, split = self._config, self.trained
        for stage, cursor, first in draws_of(config, position):
            sizes = stage.crop or config.model.sizes
            seed = config.run.seed
            box = config.data.crop_box if stage.crop else ()
            request = GridRequest.draw(
                seed, cursor, stage.batch, sizes, split, first=first, box=box
            )
            yield self.read(split, request, range(cursor, cursor + stage.batch))

    def read(self, split: GridSplit, request: GridRequest, numbers: Sequence[int]) -> GridBatch:
        """This rank's part of a request; numbers: of its samples, which decide their noise."""
        gshard = self.shard.resized(request.sizes)
        batch = read_grids(
            split,
            request,
            gshard,
            labelled=self.labelled,
            degrade=self.degrade,
            on_bad=self._config.data.on_bad,
        )
        if self.labelled:
            return batch
        return noisy(batch, gshard, self._config.run.seed, numbers)

    def loss(self, engine: Engine, micro: GridBatch, step: int, valid_tokens: int) -> Tensor:
        """Mean cross entropy, or mean squared error."""
        device, dtype = self._mesh.device, DTYPES[self._config.model.dtype]
        labels = micro.labels.to(device)
        return engine.loss(
            micro.x.to(device, dtype),
            labels.to(dtype) if labels.is_floating_point() else labels,
            self.shard.resized(micro.request.sizes),
            valid_tokens=valid_tokens,
        )

    def evaluate(self, engine: Engine, on_window: Callable[[], bool]) -> GridEvaluation | None:
        """The first `evaluate.samples` of the held-out split, whole."""
        return evaluate_grids(self._config, self, engine, on_window)

    def plan(self) -> setup.Plan:
        """Each rank rehearses its own steps without values, and all are brought together."""
        from xdist.plan import grid_step

        config = setup.resolved(self._config, self._mesh.world_size)
        mine = []
        for stage in config.train.curriculum:
            moves, memory = grid_step(config, stage, self._mesh.world_rank)
            mine.append([sum(moved.sent_bytes for moved in moves.values()), memory.peak_bytes])
        told = share_json_rows(mine, self._mesh)
        stages = range(len(mine))
        return setup.Plan(
            [[rank[stage][0] for rank in told] for stage in stages],
            [[rank[stage][1] for rank in told] for stage in stages],
        )

    def facts(self) -> dict[str, Any]:
        """The run of each rank along the sharded dim, for each size of a sample."""
        found = {}
        for stage in self._config.train.curriculum:
            gshard = self.shard.resized(stage.crop or self._config.model.sizes)
            runs = [[list(run) for run in gshard.layout.segments(r)] for r in range(gshard.size)]
            length = gshard.sizes[gshard.dim]
            found[gshard.sizes] = {"length": length, "sizes": gshard.sizes, "segments": runs}
        return {"layouts": list(found.values()), "sharded_dim": self.shard.dim}

    def summary(self, final: Any) -> tuple[dict[str, Any], list[str]]:
        """The held-out figures."""
        return final.line(), [f"held out: {final.told}"]


def noisy(batch: GridBatch, gshard: GridShard, seed: int, numbers: Sequence[int]) -> GridBatch:
    """A batch of video as `xdist.models.vdt` takes it: partly known, partly under noise; labels
    are the noise, and unknown positions count. numbers: of all samples of the request."""
    samples = [numbers[row] for row in batch.rows]
    x, noise = diffusion_inputs(batch.x, gshard, seed=seed, samples=samples)
    counts = tuple(int((1 - row).sum()) for row in x[..., KNOWN])
    return dataclasses.replace(batch, x=x, labels=noise, counts=counts)


def _check_kind(config: Config, store: GridStore) -> None:
    """A flow is trained on as a video is.

    Raises:
        DataError: a store of volumes where the config says video, or the other way round.
    """
    kind = config.data.kind
    if (store.kind == "volume") != (kind == "volume"):
        fits = "`xdist prepare volume`" if kind == "volume" else "`xdist prepare video` or `flow`"
        raise DataError(
            f"{store.path} is a store of kind {store.kind!r}",
            f"data.kind = {kind!r}, model.kind = {config.model.kind!r}",
            f"set data.store to one made by {fits}",
        )


def _check_split(config: Config, split: GridSplit) -> None:
    """Before the first step: every sample of a split is what the model is made for.

    Raises:
        DataError: other sizes, channels or classes.
    """
    model = config.model
    sizes = {split.sizes(sample) for sample in range(split.samples)}
    if sizes - {model.sizes}:
        other = min(sizes - {model.sizes})
        raise DataError(
            f"split {split.name} holds samples of other sizes than the config's",
            f"a sample has {list(other)} positions, model.sizes = {list(model.sizes)}",
            f"set model.sizes={list(other)}, or prepare the store again",
        )
    if len(split.channels) != model.channels:
        raise DataError(
            f"split {split.name} has {len(split.channels)} channels ({', '.join(split.channels)})",
            f"model.channels = {model.channels}",
            f"set model.channels={len(split.channels)}",
        )
    if config.data.kind == "volume" and len(split.classes) != model.classes:
        raise DataError(
            f"split {split.name} has {len(split.classes)} classes "
            f"({', '.join(split.classes) or 'no labels'})",
            f"model.classes = {model.classes}",
            f"set model.classes={len(split.classes)}"
            if split.classes
            else "prepare the store with labels",
        )
