"""Attention of some query heads in runs over which the number of query heads a key head is even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from xdist.parallel.attention_call import Call, Positions, Seen, joined

# Heads, and a tensor that holds them along dim 2.
Part = tuple[Sequence[int], Tensor]


@dataclass(frozen=True)
class Run:
    """Query heads `h` that share the key heads `g` evenly (local indices), and what they see."""

    h: slice
    g: slice
    seen: Seen


def runs_of(
    call: Call, heads: range, keys: range, ranks: range, most: int | None = None
) -> list[Run]:
    """Global query heads `heads`, which read `keys`, of the queries of `ranks`.

    At most three runs, at least one: a share of the heads may cut a group at either end. With
    `most`, runs of at most so many heads, of whole groups where one fits.
    """
    p = call.problem
    per_group = p.heads // p.groups
    most = len(heads) if most is None else most
    found = []
    h = heads.start
    while h < heads.stop:
        whole = min(heads.stop - h, most) // per_group if h % per_group == 0 else 0
        end = min(heads.stop, (h // per_group + 1) * per_group, h + most)
        end = h + whole * per_group if whole else end
        g = slice(h // per_group - keys.start, (end - 1) // per_group + 1 - keys.start)
        local = slice(h - heads.start, end - heads.start)
        found.append(Run(local, g, call.seen(ranks, h, end)))
        h = end
    none = slice(0, 0)
    return found or [Run(none, none, call.seen(ranks, 0, 0))]


def forward(
    call: Call, runs: list[Run], q: Tensor, k: Tensor, v: Tensor, at: Positions,
    sinks: Tensor | None = None, rounded: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out `[B,n,h,E]` and lse `[B,n,h]`, float32 or float64; `sinks` are those of q's heads. Out
    may be in q's dtype where it may be `rounded`: nothing is added to it."""
    parts = [
        call.forward(
            of_heads(q, run.h), of_heads(k, run.g), of_heads(v, run.g), run.seen, at,
            None if sinks is None else sinks[run.h], rounded=rounded,
        )
        for run in runs
    ]  # fmt: skip
    return joined([out for out, _ in parts], 2), joined([lse for _, lse in parts], 2)


def merge_forward(
    call: Call, runs: list[Run], out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    at: Positions,
) -> None:  # fmt: skip
    """Adds the attention over other keys to (`out`, `lse`), in place."""
    for run in runs:
        call.forward(
            of_heads(q, run.h), of_heads(k, run.g), of_heads(v, run.g), run.seen, at,
            into=(of_heads(out, run.h), of_heads(lse, run.h)),
        )  # fmt: skip


def backward(
    call: Call, runs: list[Run], q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    delta: Tensor | None, dout: Tensor, at: Positions, out: Tensor | None = None,
    rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq `[B,n,h,D]`, dk `[B,m,g,D]`, dv `[B,m,g,E]`, float32 or float64, or q's dtype where they
    may be `rounded`; delta may be None where out is given."""
    dqs, dks, dvs = [], [], []
    for run in runs:
        h, g = run.h, run.g
        dq, dk, dv = call.backward(
            of_heads(q, h), of_heads(k, g), of_heads(v, g), of_heads(lse, h),
            None if delta is None else of_heads(delta, h), of_heads(dout, h), run.seen, at,
            None if out is None else of_heads(out, h), rounded,
        )  # fmt: skip
        dqs.append(dq)
        dks.append((range(g.start, g.stop), dk))
        dvs.append((range(g.start, g.stop), dv))
    # A key head whose group is cut is met by two runs where a rank reads it on either side.
    return joined(dqs, 2), summed(dks, k.shape[2]), summed(dvs, v.shape[2])


def of_heads(x: Tensor, heads: slice | range) -> Tensor:
    """`heads` of x `[B, n, H, ...]`: x itself where that is all, else a view."""
    whole = heads.start == 0 and heads.stop == x.shape[2]
    return x if whole else x[:, :, heads.start : heads.stop]


def summed(parts: Sequence[Part], heads: int) -> Tensor:
    """Parts `[B, n, some heads, dim]` by head, added where heads meet; zero where no part is.

    Parts that hold every head once, in order, are only joined.
    """
    some = [(held, part) for held, part in parts if len(held)]
    if some and [h for held, _ in some for h in held] == list(range(heads)):
        return joined([part for _, part in some], 2)
    like = parts[0][1]
    total = like.new_zeros(*like.shape[:2], heads, like.shape[3])
    for held, part in some:
        total[:, :, held[0] : held[-1] + 1] += part
    return total
