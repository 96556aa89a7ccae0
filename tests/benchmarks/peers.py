"""Attention over ranks beside the peers that run on a CPU: the same tensors, groups and threads.

    make bench BENCH=peers                              the cells that are not measured yet
    CELLS=all make bench BENCH=peers                    every cell again
    CELLS="8Ki@2:8/8 128Ki-packed@4:4/2" make bench BENCH=peers
    CELLS=... ROUNDS=5 METHODS="ring DistributedAttention" make bench BENCH=peers
    MEMORY=1 make bench BENCH=peers                     memory and bytes alone, of measured cells

A cell is tokens[-packed]@ranks:query heads/key heads. The table is written after every cell. A
method that is wrong or refuses on few tokens is not timed: its row says so.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import record
import torch
from peers_measure import MEMORY_ENVIRONMENT, alone, drawn, interleaved
from peers_methods import METHODS, Sizes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xdist.testing import RankPool

TITLE = "Attention beside DeepSpeed and ringmaster"
NOTE = (
    "Causal attention, forward and backward, float32, heads of 64 (a cell is tokens@ranks:query "
    "heads/key heads), one thread a rank, gloo; packed rows hold documents of 8 Ki. Every peer is "
    "beside the strategy of xdist of its kind: ulysses, or ring with zigzag shares. Time is that "
    "of the slowest rank, median over rounds that run every method once in changing order; ratio "
    "is the median of xdist / peer over rounds, with its 95 % interval by order statistics; CPU "
    "ratio is that of the CPU time of all ranks. Bytes are sent and received by the busiest rank, "
    "counted by a dispatch mode over c10d; peak is the growth of the highest resident set of a "
    "process of its own, of the fullest rank; error is max|a - b| / max|b| against float64 of the "
    "output and of all gradients, over the query heads of the first key head. Local attention of "
    "the Ulysses peers is torch's fused one, a document at a time in DistributedAttention, which "
    "takes any function. ringmaster's Ulysses gathers everything on gloo; by all-to-all is its "
    "exchange for accelerators, put over gloo here. Its rings compute scores whole without a CUDA "
    "kernel. missed names what is not as good as the goal: interval above 1.05, more bytes, more "
    "memory. HF gathers its position ids too; it leaves documents to its local attention, and that "
    "of Transformers for a CPU takes none from position ids: packed rows are wrong. memory commit "
    "is that of memory and bytes, which are also measured without times."
)
DOCUMENT = 8192
HEADS = {8: 8, 32: 4, 128: 4}  # query heads by Ki tokens
WRONG = 1e-3
PATH = record.FOLDER / "peers.json"
# Few tokens, by which a method shows whether it answers and answers rightly.
CHECK_TOKENS = 1024


def cells() -> dict[str, tuple[Sizes, int]]:
    """Every cell by name: sizes and ranks. Two key heads on four ranks is fewer than ranks."""
    found = {}
    for (tokens, packed), ranks in product([(8, False), (32, False), (128, True)], (2, 4)):
        for groups in (HEADS[tokens], 2):
            documents = tokens * 1024 // DOCUMENT if packed else 1
            name = f"{tokens}Ki{'-packed' * packed}@{ranks}:{HEADS[tokens]}/{groups}"
            found[name] = (Sizes(tokens * 1024, HEADS[tokens], groups, documents=documents), ranks)
    return found


def run(root: Path) -> list[dict[str, Any]]:
    """Measures the cells asked for, writes after each, gives all rows known."""
    every = cells()
    known = _known()
    memory = os.environ.get("MEMORY", "") not in ("", "0")
    there = [c for c in every if (c in known) == memory]
    asked = os.environ.get("CELLS", "").split() or there
    if asked == ["all"]:
        asked = there if memory else list(every)
    if unknown := [name for name in asked if name not in (there if memory else every)]:
        raise SystemExit(f"no cells {unknown}; there are {there if memory else list(every)}")
    print(f"{len(asked)} cells: {' '.join(asked)}", flush=True)
    for name in asked:
        if memory:
            found = memory_rows(name, *every[name], known[name], _methods())
        else:
            found = cell_rows(name, *every[name], _rounds(every[name][0]), _methods())
        kept = {row["peer"]: row for row in known.get(name, [])}
        known[name] = list((kept | {row["peer"]: row for row in found}).values())
        rows = [row for cell in every for row in known.get(cell, [])]
        record.write("peers", TITLE, "make bench BENCH=peers", rows, note=NOTE)
    return [row for cell in every for row in known.get(cell, [])]


def _known() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    if PATH.exists():
        for row in json.loads(PATH.read_text(encoding="utf-8"))["rows"]:
            row.setdefault("memory commit", row["commit"])
            found.setdefault(row["cell"], []).append(row)
    return found


def _rounds(sizes: Sizes) -> int:
    asked = os.environ.get("ROUNDS")
    if asked:
        return int(asked)
    return 21 if sizes.tokens <= DOCUMENT else 9


def _methods() -> list[str]:
    words = os.environ.get("METHODS", "").split() or [""]
    peers = [n for n, m in METHODS.items() if m.like and any(word in n for word in words)]
    return list(dict.fromkeys([METHODS[n].like for n in peers] + peers))


def _of_use(names: Sequence[str]) -> list[str]:
    """Without the methods of xdist beside which no peer is left."""
    wanted = {METHODS[name].like for name in names}
    return [name for name in names if METHODS[name].like or name in wanted]


def cell_rows(
    cell: str, sizes: Sizes, ranks: int, rounds: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    """One row a peer."""
    said = dict(_faults(sizes, ranks, names))
    good = _of_use([name for name in names if name not in said])
    own = _own(cell, sizes, ranks, good)
    want = reference(sizes)
    for found in own.values():
        found["error"] = error(found.pop("ranks"), want)
    times = []
    if good:  # nothing is timed where every peer is wrong or refuses
        with RankPool(ranks) as pool:
            times = pool.run(interleaved, good, sizes, rounds)
    rows = [_row(cell, name, times, own, said) for name in names if METHODS[name].like]
    for row in rows:
        row["commit"] = row["memory commit"] = record.commit()
        print(json.dumps(row), flush=True)
    return rows


def memory_rows(
    cell: str, sizes: Sizes, ranks: int, known: Sequence[dict[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The known rows of a cell for these methods, with memory and bytes as they are now."""
    rows = [row for row in known if row["peer"] in names]
    answered = [row["peer"] for row in rows if row["peer peak (MiB)"] != ""]
    ours = [row["beside"] for row in rows if row["xdist peak (MiB)"] != ""]
    own = _own(cell, sizes, ranks, list(dict.fromkeys([*ours, *answered])))
    found = [with_memory(row, own) for row in rows]
    for row in found:
        row["memory commit"] = record.commit()
        print(json.dumps(row), flush=True)
    return found


def with_memory(row: dict[str, Any], own: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row whose memory, bytes and what they miss are those of `own`; its times stay."""
    mine, other = own.get(row["beside"]), own.get(row["peer"])
    missed = ["time"] * ("time" in str(row["missed"]).split(", "))
    changed: dict[str, Any] = {}
    for key, title in (("moved", "moved (MiB)"), ("peak", "peak (MiB)")):
        for who, found in (("xdist", mine), ("peer", other)):
            if found is not None:
                changed[f"{who} {title}"] = found[key]
    if mine is not None and other is not None:
        missed += _more(mine, other)
    return row | changed | {"missed": ", ".join(missed)}


def _more(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What ours takes more of."""
    names = {"bytes": "moved", "memory": "peak"}
    return [name for name, key in names.items() if mine[key] > other[key]]


def _own(cell: str, sizes: Sizes, ranks: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Memory, bytes and results of each method, in processes of its own."""
    own = {}
    for name in names:
        with _memory_environment(), RankPool(ranks) as pool:
            own[name] = _joined(pool.run(alone, name, sizes, _fewer(sizes)), sizes)
        print(f"{cell} {name}: {own[name]['peak']:.1f} MiB", flush=True)
    return own


def _fewer(sizes: Sizes) -> Sizes:
    """The same heads and fewer tokens, of at most four documents."""
    return replace(sizes, tokens=CHECK_TOKENS, documents=min(4, sizes.documents))


def _faults(sizes: Sizes, ranks: int, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What is said of the methods that refuse, are wrong, or would not fit this machine."""
    few = _fewer(sizes)
    want = reference(few)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with RankPool(ranks) as pool:
        for name in names:
            found = pool.run(alone, name, few, few)
            refused = next((r["refused"] for r in found if "refused" in r), "")
            off = math.nan if refused else error(found, want)
            count = METHODS[name].scores_bytes
            taken = 0 if count is None else count(sizes, ranks) * ranks
            if refused:
                yield name, f"refuses: {refused}"
            elif not off < WRONG:
                yield name, f"wrong: off by {off:.2g}"
            elif taken > machine // 2:
                yield name, f"not run: its scores or masks take {taken / 2**30:.0f} GiB"


def _joined(ranks: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    if refused := [r["refused"] for r in ranks if "refused" in r]:
        raise RuntimeError(f"{sizes}: answered for few tokens, but now {refused[0]}")
    return {
        "peak": max(r["peak_bytes"] for r in ranks) / 2**20,
        "moved": max(r["moved_bytes"] for r in ranks) / 2**20,
        "ranks": ranks,
    }


@contextmanager
def _memory_environment() -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in MEMORY_ENVIRONMENT}
    os.environ.update(MEMORY_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def reference(sizes: Sizes) -> tuple[Tensor, ...]:
    """out, dq, dk, dv in float64 of the first key head and its query heads, by torch's kernel."""
    q, k, v, dout = drawn(sizes, [(0, sizes.tokens)])
    heads = sizes.heads // sizes.groups
    inputs = [x[:, :, :h].double().detach() for x, h in ((q, heads), (k, 1), (v, 1))]
    found: list[list[Tensor]] = [[] for _ in range(4)]
    for start, stop in pairwise(sizes.cu_seqlens):
        leaves = [x[:, start:stop].clone().requires_grad_() for x in inputs]
        q_, k_, v_ = (x.transpose(1, 2) for x in leaves)
        out = scaled_dot_product_attention(
            q_, k_.expand_as(q_), v_.expand_as(q_), is_causal=True
        ).transpose(1, 2)
        grads = torch.autograd.grad(out, leaves, dout[:, start:stop, :heads].double())
        for place, x in zip(found, (out.detach(), *grads), strict=True):
            place.append(x)
    return tuple(torch.cat(parts, dim=1) for parts in found)


def error(ranks: list[dict[str, Any]], want: Sequence[Tensor]) -> float:
    """The worst of out, dq, dk and dv: max|a - b| / max|b| over all tokens; NaN stays NaN."""
    off = []
    for i, right in enumerate(want):
        whole = torch.full_like(right, torch.nan)
        for rank in ranks:
            at = torch.cat([torch.arange(*segment) for segment in rank["segments"]])
            whole[:, at] = rank["results"][i].double()
        off.append((whole - right).abs().max() / right.abs().max())
    return float(torch.stack(off).max())


def slowest(ranks: list[dict[str, list[tuple[float, ...]]]]) -> dict[str, list[float]]:
    """Wall seconds of the slowest rank by method, one entry a round."""
    found = {}
    for name in ranks[0]:
        turns = zip(*(rank[name] for rank in ranks), strict=True)
        found[name] = [max(wall for wall, _ in turn) for turn in turns]
    return found


def worked(ranks: list[dict[str, list[tuple[float, ...]]]]) -> dict[str, list[float]]:
    """CPU seconds of all ranks together by method, one entry a round."""
    found = {}
    for name in ranks[0]:
        turns = zip(*(rank[name] for rank in ranks), strict=True)
        found[name] = [sum(cpu for _, cpu in turn) for turn in turns]
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median by order statistics; NaN for fewer than six."""
    n, ordered = len(values), sorted(values)
    outside, depth = 0.0, 0
    while True:
        outside += 2 * math.comb(n, depth) / 2**n
        if outside > 0.05:
            break
        depth += 1
    return (math.nan, math.nan) if depth == 0 else (ordered[depth - 1], ordered[n - depth])


def _row(
    cell: str,
    peer: str,
    ranks: list[dict[str, list[tuple[float, ...]]]],
    own: dict[str, dict[str, Any]],
    said: dict[str, str],
) -> dict[str, Any]:
    ours = METHODS[peer].like
    mine, other = own.get(ours), own.get(peer)
    row: dict[str, Any] = {"cell": cell, "peer": peer, "beside": ours}
    names = ("rounds", "xdist (s)", "peer (s)", "ratio", "95 % interval", "CPU ratio")
    row |= dict.fromkeys(names, "")
    missed = []
    if mine is not None and other is not None:
        times, cpu = slowest(ranks), worked(ranks)
        ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
        middle, (low, high) = statistics.median(ratios), interval(ratios)
        row["rounds"], row["ratio"] = len(ratios), middle
        row["xdist (s)"] = statistics.median(times[ours])
        row["peer (s)"] = statistics.median(times[peer])
        row["95 % interval"] = "" if math.isnan(high) else f"{low:.2f} to {high:.2f}"
        row["CPU ratio"] = statistics.median(
            a / b for a, b in zip(cpu[ours], cpu[peer], strict=True)
        )
        # Without enough rounds for an interval the median itself must do.
        missed += ["time"] * ((middle if math.isnan(high) else high) > 1.05)
        missed += _more(mine, other)
    units = (("moved", "moved", "MiB"), ("peak", "peak", "MiB"), ("error", "error", ""))
    for key, title, unit in units:
        for who, found in (("xdist", mine), ("peer", other)):
            value = "" if found is None else found[key]
            row[f"{who} {title}" + f" ({unit})" * bool(unit)] = value
    return row | {"missed": ", ".join(missed), "the peer": said.get(peer, "")}
