"""Does the split of a grid change anything? The same module, sharded first along each dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

import xdist
from xdist.certify.judge import Comparison, Report, judge
from xdist.certify.measure import Measurement, Request, digest_of, functional, make_module
from xdist.certify.run import check_request, probe_positions
from xdist.comm import ledger
from xdist.grid_shard import GridShard
from xdist.layout import Layout
from xdist.mesh import Mesh
from xdist.models.vdt_inputs import diffusion_inputs
from xdist.rank import read_rank
from xdist.testing import RankPool
from xdist.train.gradients import reduce_gradients

Factory = Callable[..., nn.Module]
# Bytes each rank sends in one forward, backward and gradient sum, by (ranks, dtype, dim).
Planned = Callable[[int, str, int], Sequence[int]]
PARAMETERS = {"float64": torch.float64, "float32": torch.float32}
# Of 16 positions one has no class.
UNLABELLED = 16


@dataclass(frozen=True)
class GridRequest(Request):
    """What every rank is asked to run: samples `[B, S1..Sk, channels]`.

    classes: of the labels; 0 is video under noise, as `xdist.models.vdt` takes it. dim: which is
    sharded first. `length` is the number of positions, numbered with the last dim fastest.
    """

    sizes: tuple[int, ...] = ()
    channels: int = 1
    classes: int = 0
    dim: int = 0
    note: str = ""

    @property
    def told(self) -> str:
        """For the table's title."""
        samples = f"{self.batch} samples of {' x '.join(map(str, self.sizes))} positions"
        return f"{samples}; {self.note}" if self.note else samples

    def make_layout(self, ranks: int) -> Layout:
        """Which positions each of this many ranks holds."""
        mesh = Mesh.imagined(0, ring=ranks)
        return GridShard(mesh, self.sizes, self.dim).flattened.layout


def certify_grids(
    factory: Factory,
    *,
    sizes: Sequence[int],
    channels: int = 1,
    classes: int = 0,
    dims: Sequence[int] | None = None,
    ranks: Sequence[int] = (1, 2, 3),
    batch: int = 2,
    seed: int = 0,
    dtypes: Sequence[str] = ("float64", "float32"),
    degrees: Mapping[int, tuple[int, int]] | None = None,
    planned: Planned | None = None,
    pools: Mapping[int, RankPool] | None = None,
    note: str = "",
) -> Report:
    """Runs one module of grids on several rank counts, sharded first along each dim, and compares
    each with one rank in float64.

    Compared are outputs, the loss on every rank, every parameter's gradient after
    `xdist.reduce_gradients`, that all ranks hold the same gradients, and the bytes sent.

    Args:
        factory: as of `certify`. The module is called as `module(x, gshard)`, x `[B, s1..sk, C]`
            this rank's part, and returns `[B, s1..sk, ...]` at the same positions in the same
            sharding; `loss(x, labels, gshard)` is its loss, labels int64 `[B, s1..sk]`, or the
            noise, float, where `classes` is 0.
        sizes: positions of a sample along each dim; need not divide by the ranks.
        channels, classes: of a sample; classes 0 is video: x then has two channels more.
        dims: which are sharded first, in turn; None is all of them.
        ranks, batch, seed, dtypes, degrees, pools: as of `certify`.
        planned: bytes each rank sends, for (ranks, dtype, dim); compared with the ledger exactly.
        note: what the reader of the table should know of the module.

    Returns:
        A Report with a row a rank count, dim and dtype.

    Raises:
        ConfigError: an unknown dtype, a rank count below 1, or a module whose output does not
            answer for its positions.
        LaunchError: called inside a started rank; certify starts ranks of its own.
    """
    length = prod(sizes)
    request = GridRequest(
        length=length,
        vocab_size=0,
        batch=batch,
        seed=seed,
        dtypes=tuple(dict.fromkeys(("float64", *dtypes))),
        degrees=tuple((count, *pair) for count, pair in (degrees or {}).items()),
        causal=False,
        probes=probe_positions(length, batch, max(ranks, default=1)),
        sizes=tuple(sizes),
        channels=channels,
        classes=classes,
        note=note,
    )
    check_request(request, ranks)
    chosen = tuple(range(len(request.sizes)) if dims is None else dims)
    alone = measure_grids(factory, request, (0,))[0]
    report = Report(request)
    for count in sorted(set(ranks)):
        found = _on_ranks(factory, request, count, chosen, pools or {}) if count > 1 else [[alone]]
        for index, dim in enumerate(chosen if count > 1 else (0,)):
            here = dataclasses.replace(request, dim=dim)
            for dtype in request.dtypes:
                one = [rank[index][dtype] for rank in found]
                comparison = Comparison(here, dtype, one, alone[dtype], alone["float64"])
                row, findings = judge(comparison, planned(count, dtype, dim) if planned else None)
                report.rows.append(dataclasses.replace(row, dim=dim))
                report.findings += [
                    dataclasses.replace(f, what=f"sharded along dim {dim}: {f.what}")
                    for f in findings
                ]
    return report


def _on_ranks(
    factory: Factory,
    request: GridRequest,
    count: int,
    dims: tuple[int, ...],
    pools: Mapping[int, RankPool],
) -> list[list[dict[str, Measurement]]]:
    """By rank, then by dim, then by dtype."""
    if count in pools:
        return pools[count].run(measure_grids, factory, request, dims)
    with RankPool(count) as pool:
        return pool.run(measure_grids, factory, request, dims)


def measure_grids(
    factory: Factory, request: GridRequest, dims: tuple[int, ...]
) -> list[dict[str, Measurement]]:
    """Measures on this rank, once per dim and dtype; called on every rank of the world."""
    world = read_rank().world_size
    ring, ulysses = request.degrees_of(world)
    mesh = xdist.init_mesh(data=1, ring=ring, ulysses=ulysses)
    whole = GridShard(mesh, request.sizes, 0)
    return [
        {name: _measure_one(factory, request, whole.along(dim), name) for name in request.dtypes}
        for dim in dims
    ]


def _measure_one(
    factory: Factory, request: GridRequest, gshard: GridShard, precision: str
) -> Measurement:
    module = make_module(factory, precision, request.seed)
    x, labels, changed = draw_samples(request, PARAMETERS[precision])
    local, target = gshard.scatter(x), gshard.scatter(labels)
    with torch.no_grad():
        outputs = _answers(module(local, gshard), gshard, request)
        probed = _answers(module(gshard.scatter(changed), gshard), gshard, request)
    module.zero_grad(set_to_none=True)
    with ledger() as moved:
        loss: Tensor = module.loss(local, target, gshard)  # type: ignore[operator]
        loss.backward()
        reduce_gradients(module, gshard.mesh)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    return Measurement(
        positions=torch.as_tensor(gshard.flattened.positions).clone(),
        outputs=outputs,
        probed=probed,
        loss=float(loss.detach()),
        gradients=gradients if gshard.rank == 0 else {},
        digests={name: digest_of([grad]) for name, grad in gradients.items()},
        weights=digest_of([p.detach() for p in module.parameters()]),
        sent_bytes=moved.sent_bytes,
        sent_by_move={move: traffic.sent_bytes for move, traffic in moved.by_move.items()},
    )


def _answers(output: Tensor, gshard: GridShard, request: GridRequest) -> Tensor:
    """One number a position, `[B, n]`: see `functional`."""
    local = prod(gshard.local_sizes)
    flat = output
    if isinstance(output, Tensor) and output.shape[1:-1] == gshard.local_sizes:
        flat = output.reshape(output.shape[0], local, output.shape[-1])
    return functional(flat, torch.empty(request.batch, local), request.seed)


def draw_samples(request: GridRequest, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Whole x and labels from the seed, and x with one position a row changed (`probes`); equal on
    every rank."""
    generator = torch.Generator().manual_seed(request.seed)
    shape = (request.batch, *request.sizes)
    x = torch.randn(*shape, request.channels, generator=generator, dtype=torch.float64)
    if request.classes:
        labels = torch.randint(0, request.classes, shape, generator=generator)
        labels[torch.randint(0, UNLABELLED, shape, generator=generator) == 0] = -100
    else:
        samples = range(request.batch)
        x, labels = diffusion_inputs(x, None, seed=request.seed, samples=list(samples))
        labels = labels.to(dtype)
    changed = x.clone()
    for row, position in enumerate(request.probes):
        # Of video the last two channels say what is known, and when.
        changed[row].view(request.length, -1)[position, : request.channels] += 1.0
    return x.to(dtype), labels, changed.to(dtype)
