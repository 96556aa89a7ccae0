"""Starts the ranks, collects what they measured, and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from xdist.certify.judge import Comparison, Report, judge
from xdist.certify.measure import DTYPES, Measurement, Request, measure
from xdist.errors import ConfigError, LaunchError
from xdist.rank import read_rank
from xdist.testing import RankPool

Factory = Callable[..., nn.Module]
# Bytes each rank sends in one forward, backward and gradient reduction, by (ranks, dtype).
Planned = Callable[[int, str], Sequence[int]]


def certify(
    factory: Factory,
    *,
    vocab_size: int,
    length: int,
    ranks: Sequence[int] = (1, 2, 3),
    batch: int = 2,
    seed: int = 0,
    layout: str = "contiguous",
    documents: Sequence[int] | None = None,
    causal: bool = True,
    dtypes: Sequence[str] = ("float64", "float32"),
    degrees: Mapping[int, tuple[int, int]] | None = None,
    planned: Planned | None = None,
    pools: Mapping[int, RankPool] | None = None,
) -> Report:
    """Runs one module on several rank counts and compares each with one rank in float64.

    Compared, per rank count and dtype: the outputs (a fixed random functional of each position),
    the loss on every rank, every parameter's gradient after `xdist.reduce_gradients`, that all
    ranks hold the same gradients; then a leak probe (one token of each row is changed: no output
    of an earlier position or of another document may move), and the bytes sent against `planned`.

    Args:
        factory: makes the module; importable by name (a module-level function, or a
            functools.partial of one), as each rank is a process of its own. One that takes
            `precision=` ("float64", "float32", "bfloat16") answers for the dtypes inside; otherwise
            the module is converted with `.to(dtype)`. Parameters that start constant (zeros, ones)
            are drawn anew, since they would hide what lies behind them. The module is called
            as `module(tokens, shard)`, tokens int64 [B, n], and returns [B, n, ...]. A method
            `loss(tokens, labels, shard)` is used when there is one (labels int64 [B, n], -100 for
            none); otherwise the loss is the global mean of a fixed function of the outputs.
        vocab_size: tokens are drawn from [0, vocab_size).
        length: tokens of one sequence over all ranks; need not divide by the ranks.
        ranks: the rank counts; 1 is always run, as the reference.
        documents: `cu_seqlens` of packed documents, or None for one document.
        causal: whether an output may depend on earlier tokens only; False probes documents only.
        degrees: (ring, ulysses) by rank count; otherwise ring = ranks, ulysses = 1.
        planned: bytes each rank sends, for (ranks, dtype); compared with the ledger exactly.
        pools: running `RankPool`s by size, to be used instead of starting new ones.

    Returns:
        A Report; `report.passed`, `report.table()`, `report.raise_if_failed()`.

    Raises:
        ConfigError: an unknown dtype or layout, a rank count below 1, or a module whose output
            does not answer for its tokens.
        LaunchError: called inside a started rank; certify starts ranks of its own.
    """
    request = Request(
        length=length,
        vocab_size=vocab_size,
        batch=batch,
        seed=seed,
        layout=layout,
        documents=None if documents is None else tuple(int(cut) for cut in documents),
        dtypes=tuple(dict.fromkeys(("float64", *dtypes))),
        degrees=tuple((count, *pair) for count, pair in (degrees or {}).items()),
        causal=causal,
        probes=probe_positions(length, batch, max(ranks, default=1)),
    )
    check_request(request, ranks)
    alone = measure(factory, request)
    report = Report(request)
    for count in sorted(set(ranks)):
        found = [alone] if count == 1 else _on_ranks(factory, request, count, pools or {})
        for dtype in request.dtypes:
            comparison = Comparison(
                request, dtype, [r[dtype] for r in found], alone[dtype], alone["float64"]
            )
            row, findings = judge(comparison, planned(count, dtype) if planned else None)
            report.rows.append(row)
            report.findings += findings
    return report


def probe_positions(length: int, batch: int, ranks: int) -> tuple[int, ...]:
    """One position a row: the ends of the first segments, where a missing halo shows, by turns.

    Row 0 is changed at the first token of the second segment, row 1 at the last token of the
    first, and so on; with one rank they are spread over the sequence.
    """
    step = max(1, -(-length // max(2, ranks)))
    edges = [edge for start in range(step, length, step) for edge in (start, start - 1)]
    edges = edges or [length // 2]
    return tuple(edges[row % len(edges)] for row in range(batch))


def _on_ranks(
    factory: Factory, request: Request, count: int, pools: Mapping[int, RankPool]
) -> list[dict[str, Measurement]]:
    if count in pools:
        return pools[count].run(measure, factory, request)
    with RankPool(count) as pool:
        return pool.run(measure, factory, request)


def check_request(request: Request, ranks: Sequence[int]) -> None:
    """Refuses what cannot be certified, before any rank is started."""
    world = read_rank().world_size
    if world != 1:
        raise LaunchError(
            "certify starts ranks of its own and was called inside a started rank",
            f"WORLD_SIZE is {world}",
            "run it in one plain process: xdist certify CONFIG",
        )
    if unknown := [name for name in request.dtypes if name not in DTYPES]:
        raise ConfigError(f"certify knows no precision {unknown}", f"it compares {list(DTYPES)}")
    if request.layout not in ("contiguous", "zigzag"):
        raise ConfigError(f"unknown layout {request.layout!r}", "", "contiguous or zigzag")
    if not ranks or min(ranks) < 1 or request.length < 1 or request.batch < 1:
        raise ConfigError(
            "certify needs at least one rank, one token and one sequence",
            f"ranks={tuple(ranks)}, length={request.length}, batch={request.batch}",
        )
