"""The hybrid model on many ranks equals one rank: loss, gradients, logits, bytes, exchanges."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from torch import Tensor

import xdist
from xdist.cost.model import Streamed, loss_bytes, pass_bytes
from xdist.documents import Documents
from xdist.models.hybrid_lm import HybridConfig, HybridLM, build
from xdist.testing import RankPool, count_c10d_bytes, layouts

SIZES = {
    "vocab_size": 29, "dim": 16, "pattern": "linear,attention,linear", "head_dim": 8,
    "window": 9, "ngram_orders": (2, 3), "ngram_buckets": 64,
}  # fmt: skip
CUTS = [0, 1, 2, 31, 31, 60, 61]


def model_of(dtype: str) -> HybridLM:
    """A small model whose tables and head are not zero, so that every gradient is alive."""
    config = HybridConfig(dtype=dtype, **SIZES)  # type: ignore[arg-type]
    model = build(config, tile_tokens=48, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.2 * noise).to(parameter.dtype))
    return model


def batch(n: int, rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and labels [rows, n]; some labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 29, (rows, n), generator=generator)
    labels = torch.randint(0, 29, (rows, n), generator=generator)
    labels[0, 3:7] = -100
    return tokens, labels


def gradients(loss: Tensor, model: HybridLM) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, list(model.parameters()))]


def summed(parts: list[Tensor], mesh: xdist.Mesh) -> list[Tensor]:
    """The parts of all data x sequence ranks added up in float64."""
    from xdist.comm.reduce import start_reduce

    flat = torch.cat([part.flatten() for part in parts])
    total = start_reduce(flat, mesh.parameter_group).wait()
    return [t.view_as(p) for t, p in zip(total.split([p.numel() for p in parts]), parts)]  # noqa: B905


def run_cases(
    cases: list[tuple[int, list, list[int] | None, str, int]],
) -> list[tuple[float, float, float]]:
    """For each case the error of the loss and logits, the worst gradient's, and one rank's worst
    gradient in the same dtype, all against float64 on one rank."""
    found = []
    for n, segments, cuts, dtype, seed in cases:
        mesh = xdist.init_mesh(ring=len(segments))
        layout = xdist.Layout.from_segments(n, segments)
        shard = xdist.SequenceShard(mesh, layout, cuts)
        alone = xdist.SequenceShard(_one_rank(mesh), xdist.Layout.contiguous(n, 1), cuts)
        tokens, labels = batch(n, seed=seed)
        whole, model = model_of("float64"), model_of(dtype)
        with torch.no_grad():
            for a, b in zip(whole.parameters(), model.parameters(), strict=True):
                a.copy_(b)
        wanted = whole.loss(tokens, labels, alone)
        wants = gradients(wanted, whole)
        loss = model.loss(tokens[:, shard.positions], labels[:, shard.positions], shard)
        owns = summed(gradients(loss, model), mesh)
        single = gradients(model.loss(tokens, labels, alone), model)
        logits = model(tokens[:, shard.positions], shard).double()
        want = whole(tokens, alone)[:, shard.positions]
        off = float((logits - want).detach().abs().max()) if logits.numel() else 0.0
        off = max(off, abs(float(loss.detach()) - float(wanted.detach())))
        found.append((off, worst(owns, wants), worst(single, wants)))
    return found


def worst(owns: list[Tensor], wants: list[Tensor]) -> float:
    """The largest error of a gradient against the largest value of what it should be."""
    pairs = zip(owns, wants, strict=True)
    return max(float((own - want).abs().max() / want.abs().max()) for own, want in pairs)


def _one_rank(mesh: xdist.Mesh) -> xdist.Mesh:
    return xdist.Mesh(1, 1, 1, 0, mesh.device)


def _pool(request: pytest.FixtureRequest, parts: int) -> RankPool:
    return request.getfixturevalue(f"pool{parts}")


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_loss_logits_and_every_gradient_equal_one_rank(
    request: pytest.FixtureRequest, parts: int
) -> None:
    cases = []
    for n, cuts in ((61, None), (61, CUTS), (5, [0, 2, 5])):
        for layout in layouts(n, parts, seed=parts).values():
            segments = [layout.segments(rank) for rank in range(parts)]
            cases.append((n, segments, cuts, "float64", 0))
    segments = [xdist.Layout.zigzag(61, parts).segments(rank) for rank in range(parts)]
    cases += [(61, segments, CUTS, "float32", seed) for seed in range(5)]
    for result in _pool(request, parts).run(run_cases, cases):
        for case, (value, gradient, _) in zip(cases[:-5], result[:-5], strict=True):
            assert value <= 1e-10, case
            assert gradient <= 1e-10, case
        # Law 1 for float32: medians over five seeds, against the same kernels on one rank.
        value, gradient, single = (median(part) for part in zip(*result[-5:], strict=True))
        assert value <= 1e-4
        assert gradient <= max(2e-6, 1.5 * single)


def count_bytes(cases: list[tuple[list, list[int] | None]]) -> None:
    """On one rank: ledger = formula = bytes counted by a dispatch mode, exchanges as listed."""
    for segments, cuts in cases:
        n = max(stop for runs in segments for _, stop in runs)
        mesh = xdist.init_mesh(ring=len(segments))
        layout = xdist.Layout.from_segments(n, segments)
        shard = xdist.SequenceShard(mesh, layout, cuts)
        model = model_of("float32")
        tokens, labels = batch(n)
        at = shard.positions
        with count_c10d_bytes() as counted, xdist.comm.ledger() as moved:
            model.loss(tokens[:, at], labels[:, at], shard).backward()
        rank = mesh.sequence_rank
        cu_seqlens = Documents.of(cuts, n).cu_seqlens
        want = pass_bytes(Streamed.of(model.config), layout, cu_seqlens, rank, rows=2)
        want["reduce"] = loss_bytes(len(segments), rank, counted=True)
        for move, bytes_ in want.items():
            own = moved.by_move.get(move, xdist.comm.Traffic())
            assert (own.sent_bytes, own.received_bytes) == tuple(bytes_), (segments, move)
        assert moved.sent_bytes == counted.sent_bytes
        # Nothing is repeated in backward: 1 + 3 halos forward and 3 back, 2 scans each way (none
        # where no state leaves a segment), 2 reduces of 2 exchanges.
        assert moved.by_move["halo"].calls == 7
        scans = moved.by_move["scan"].calls if "scan" in moved.by_move else 0
        assert scans == (4 if len(layout.pieces) > 1 else 0)


def test_bytes_of_a_step_are_the_formula_and_no_exchange_is_repeated(pool3: RankPool) -> None:
    cases = []
    for layout in layouts(61, 3, seed=1).values():
        segments = [layout.segments(rank) for rank in range(3)]
        cases += [(segments, None), (segments, [0, 25, 61])]
    pool3.run(count_bytes, cases)


def data_by_sequence() -> tuple[float, float]:
    """Data 2 x sequence 2: rank pairs hold different rows, with uneven ignored labels."""
    mesh = xdist.init_mesh(data=2, ring=2)
    n = 37
    tokens, labels = batch(n, rows=4)
    labels[2:, 5:30] = -100
    shard = xdist.SequenceShard(mesh, xdist.Layout.zigzag(n, 2))
    rows = slice(2 * mesh.data_rank, 2 * mesh.data_rank + 2)
    model = model_of("float64")
    wanted = model.loss(tokens, labels)
    wants = gradients(wanted, model)
    at = shard.positions
    loss = model.loss(tokens[rows][:, at], labels[rows][:, at], shard)
    owns = summed(gradients(loss, model), mesh)
    return abs(float(loss.detach()) - float(wanted.detach())), worst(owns, wants)


def test_data_two_by_sequence_two_gives_the_mean_of_the_global_batch(pool4: RankPool) -> None:
    for value, gradient in pool4.run(data_by_sequence):
        assert value <= 1e-12
        assert gradient <= 1e-10
