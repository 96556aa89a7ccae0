"""Draws calls of every family that has Triton kernels, and asks whether the table of compiled
kernels covers what they would start: `python drawn_launches.py SEED CALLS COMPILED TABLE`.

CALLS calls of each family and target are drawn over what the wrappers accept, by themselves: no
case of a family is looked at. Of the launches that are no row of the table, COMPILED of each family
and target are compiled exactly as drawn, and must need no more shared memory than the rows that
bound them (some kernels a little more: MORE_BYTES). Run without TRITON_INTERPRET; 1 where
something is not as it should be.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdist_kernels import ahead, ahead_table, attention, conv, delta, linear, selective_scan
from xdist_kernels.ahead_cover import Cover
from xdist_kernels.attention import triton as attention_kernels
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.conv import triton as conv_kernels
from xdist_kernels.cross_entropy import triton as loss_kernels
from xdist_kernels.delta import triton as delta_kernels
from xdist_kernels.launch import recording
from xdist_kernels.linear import bidirectional
from xdist_kernels.linear import triton as linear_kernels
from xdist_kernels.merge import triton as merge_kernels
from xdist_kernels.selective_scan import triton as scan_kernels

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
FLOAT = torch.float32
# What a launch may need beyond its bounding rows, 0 where not named; with it, it must still fit.
MORE_BYTES = {
    # Values pass between layouts through shared memory, which masks and widths decide: 16,384 where
    # a mask cuts a key dim in blocks of 256 and betas are narrower than float32, rows have 8,192.
    ("delta", "prepare_kernel"): 8192,
    # What warps add up together: 1,024 for a width that a mask cuts, rows have 256.
    ("attention", "attention_delta_kernel"): 1024,
    # The same: 1,024 for 65 to 128 states, rows of more states, on fewer channels, have 512.
    ("selective_scan", "walk_back"): 512,
    # The same: 256 for 16 short rows at once, rows of other widths of numbers have 128.
    ("cross_entropy", "short_rows_kernel"): 128,
}


def _of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dim(draw: random.Random, most: int = 256) -> int:
    """A head dim: any, or one that models have."""
    return draw.choice(
        [draw.randint(1, most), draw.choice((16, 32, 48, 64, 80, 96, 128, 192, 256))]
    )


def _heads(draw: random.Random) -> tuple[int, int]:
    """Query or value heads, and the key heads that they share."""
    groups = draw.choice((1, 2, 3, 8, 64))
    return groups * draw.choice((1, 1, 2, 4)), groups


def _tokens(draw: random.Random) -> int:
    return draw.choice((1, draw.randint(1, 300), draw.randint(300, 9000)))


def draw_attention(draw: random.Random) -> None:
    dtype, (heads, groups), batch = draw.choice(DTYPES), _heads(draw), draw.choice((1, 3))
    n, m, dim, width = _tokens(draw), _tokens(draw), _dim(draw), _dim(draw)
    q, k = _of(dtype, batch, n, heads, dim), _of(dtype, batch, m, groups, dim)
    v, dout = _of(dtype, batch, m, groups, width), _of(dtype, batch, n, heads, width)
    softcap = draw.choice((None, 30.0))
    at = _of(torch.int64, n)
    dropout = draw.choice((None, Dropped(0.1, 1, 0, 0, at)))
    assert attention.refusal(q, k, v, softcap=softcap, dropout=dropout) is None
    seen = draw.choice((at, _of(torch.int64, heads, n)))
    keys, spans = _of(torch.int64, m), (seen, seen, at, at)
    plans = draw.choice((None, attention_kernels.Plans(spans, keys)))
    sinks = draw.choice((None, *(_of(x, heads) for x in DTYPES)))
    into, made = None, draw.choice((None, dtype, *DTYPES))
    if draw.random() < 0.4:
        into, made = (_of(FLOAT, batch, n, heads, width), _of(FLOAT, batch, n, heads)), None
    precision = draw.choice(attention_kernels.PRECISIONS)
    both = {"scale": 0.1, "spans": spans, "k_positions": keys, "softcap": softcap}
    both |= {"dropout": dropout, "plans": plans, "dtype": made, "precision": precision}
    out, lse = attention_kernels.attention_forward(q, k, v, sinks=sinks, into=into, **both)
    given = draw.choice((None, attention_kernels.attention_delta(out, dout)))
    attention_kernels.attention_backward(q, k, v, lse, given, dout, out=out, **both)


def _tile(draw: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v, log decays (none, scalar or diagonal), and where documents start."""
    dtype, (heads, groups), batch = draw.choice(DTYPES), _heads(draw), draw.choice((1, 4))
    n, dim, width = _tokens(draw), _dim(draw), _dim(draw)
    q, k = (_of(dtype, batch, n, groups, dim) for _ in range(2))
    v = _of(dtype, batch, n, heads, width)
    gates = draw.choice(DTYPES)
    decay = draw.choice(
        (None, _of(gates, batch, n, heads, 1), _of(gates, batch, n, heads, max(2, dim)))
    )
    if decay is not None and decay.shape[3] > 1:
        decay = decay[..., :dim]
    return q, k, v, decay, draw.choice((None, _of(torch.bool, n)))


def draw_linear(draw: random.Random) -> None:
    q, k, v, decay, starts = _tile(draw)
    assert linear.refusal(q, k, v, decay) is None
    state = _of(FLOAT, v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if (decay is None or decay.shape[3] == 1) and draw.random() < 0.4:
        sides = bidirectional.Sides(state, state)
        inputs = (q, k, v, decay, starts)
        out, after = bidirectional.run_merged(*inputs, sides, scale=0.1)
        bidirectional.backward_merged(*inputs, sides, out, after, scale=0.1)
        return
    p = linear_kernels.prepare(q, k, v, decay, scale=0.1, starts=starts)
    out, end = linear_kernels.run(draw.choice((p, linear_kernels.ahead(p))), state)
    linear_kernels.advance(p, state)
    if starts is None:
        linear_kernels.transition(p)
    linear_kernels.adjoint(p, out, end)
    ready = linear_kernels.backward_ahead(p, state, out)
    linear_kernels.backward(draw.choice((p, ready)), state, out, end)


def draw_delta(draw: random.Random) -> None:
    q, k, v, decay, starts = _tile(draw)
    if draw.random() < 0.1:
        v = _of(v.dtype, *v.shape[:3], draw.randint(257, 1000))
    if decay is not None and decay.shape[3] == 1:
        decay = decay.squeeze(3)
    beta = _of(draw.choice(DTYPES), *v.shape[:3])
    assert delta.refusal(q, k, v, beta, decay) is None
    state = _of(FLOAT, v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    precision = draw.choice(delta_kernels.PRECISIONS)
    p = delta_kernels.prepare(q, k, v, beta, decay, 0.1, starts, precision=precision)
    out, end = delta_kernels.run(draw.choice((p, delta_kernels.ahead(p))), state)
    delta_kernels.advance(p, state)
    if starts is None:
        delta_kernels.transition(p)
    delta_kernels.adjoint(p, out, end)
    ready = draw.choice((p, delta_kernels.backward_ahead(p, state, out)))
    delta_kernels.backward(ready, state, out, end, narrow=draw.random() < 0.5)


def draw_selective_scan(draw: random.Random) -> None:
    batch, n, channels = draw.choice((1, 5)), _tokens(draw), draw.choice((1, 48, 700, 4096))
    states = draw.choice((draw.randint(1, 256), 1, 16, 64))
    u = _of(draw.choice(DTYPES), batch, n, channels, 1)
    steps = _of(draw.choice(DTYPES), batch, n, channels, 1)
    rates = _of(draw.choice(DTYPES), channels, states)
    b, c = (_of(draw.choice(DTYPES), batch, n, 1, states) for _ in range(2))
    assert selective_scan.refusal(u, steps, rates, b, c) is None
    p = scan_kernels.prepare(u, steps, rates, b, c, draw.choice((None, _of(torch.bool, n))))
    state = _of(FLOAT, batch, channels, states, 1)
    out, end = scan_kernels.run(p, state)
    scan_kernels.advance(p, state)
    scan_kernels.adjoint(p, out, end)
    ready = draw.choice((p, scan_kernels.backward_ahead(p, out)))
    scan_kernels.backward(ready, state, out, end)


def draw_conv(draw: random.Random) -> None:
    batch, n, channels = draw.choice((1, 3)), _tokens(draw), draw.choice((1, 64, 1000))
    width, dtype = draw.randint(1, conv_kernels.LARGEST_WIDTH), draw.choice(DTYPES)
    x, weight = _of(dtype, batch, n, channels), _of(draw.choice(DTYPES), channels, width)
    bias = draw.choice((None, *(_of(d, channels) for d in DTYPES)))
    activation = draw.choice((None, "silu"))
    assert conv.refusal(x, weight, bias, activation) is None
    given: dict[str, Any] = {
        "activation": activation,
        "prefix": draw.choice((None, _of(draw.choice(DTYPES), batch, width - 1, channels))),
        "into_document": draw.choice((None, _of(torch.int64, n))),
    }
    out = conv_kernels.causal_conv_forward(x, weight, bias, **given)
    into = draw.choice((None, _of(FLOAT, batch, width - 1 + n, channels)))
    conv_kernels.causal_conv_backward(x, weight, bias, out, **given, into=into)


def draw_cross_entropy(draw: random.Random) -> None:
    vocab = draw.choice((draw.randint(1, 300), draw.randint(300, 20000), draw.randint(1, 200000)))
    tokens, dtype = draw.randint(1, 100), draw.choice(DTYPES)
    logits = loss_kernels.empty_tile(tokens, vocab, dtype, torch.device("meta"))
    logits = draw.choice((logits, _of(dtype, tokens, vocab)))
    loss_kernels.tile_loss(logits, _of(torch.int64, tokens), -100, 1.0)


def draw_merge(draw: random.Random) -> None:
    size, n, heads = draw.choice((_dim(draw), draw.randint(1, 8192))), _tokens(draw), 6
    some = slice(0, draw.choice((3, heads)))
    out, other = (_of(FLOAT, 2, n, heads, size)[:, :, some] for _ in range(2))
    if draw.random() < 0.5:
        merge_kernels.merge_sinks_(
            out, _of(FLOAT, *out.shape[:3]), _of(draw.choice(DTYPES), out.shape[2])
        )
    else:
        lse, more = (_of(FLOAT, *out.shape[:3]) for _ in range(2))
        merge_kernels.merge_(out, lse, other, more)


FAMILIES: dict[str, Callable[[random.Random], None]] = {
    "attention": draw_attention,
    "linear": draw_linear,
    "delta": draw_delta,
    "selective_scan": draw_selective_scan,
    "conv": draw_conv,
    "cross_entropy": draw_cross_entropy,
    "merge": draw_merge,
}


def check(target: str, seed: int, calls: int, compiled: int, table: Path) -> list[str]:
    """What is wrong with `calls` drawn calls of each family on `target`."""
    rows, cover = ahead_table.read(table), Cover()
    for plan in ahead.planned(target):
        cover.add(plan.launch, plan.key)
    wrong, total = set(), 0
    for family, make in FAMILIES.items():
        draw = random.Random(f"{seed} {family}")
        plans: dict[str, ahead.Planned] = {}
        for _ in range(calls):
            with recording(ahead.TARGETS[target]) as found:
                make(draw)
            total += len(found)
            for launch in found:
                key = ahead.key_of(launch, ahead.TARGETS[target])
                plans[key] = ahead.Planned(family, "drawn", target, launch, key)
        allowed = {key: _allowed(plan, cover, rows) for key, plan in plans.items()}
        for key, plan in plans.items():
            wrong |= {f"{target}: {fact}" for fact in cover.lacks(plan.launch)}
            if (most := allowed[key]) is None or most > ahead.TARGETS[target].shared_bytes:
                wrong.add(f"{target}: {plan.launch} is bound by {most} bytes")
        # What is a row was compiled for it; where all are, one is compiled again.
        unseen = sorted(plans.keys() - rows.keys()) or sorted(plans)
        for key in draw.sample(unseen, min(compiled, len(unseen))):
            wrong.add(_beyond(plans[key], allowed[key] or 0))
    wrong.discard("")
    print(f"{target}: {total} launches drawn, by {calls} calls of each family")
    return sorted(wrong)


def _allowed(plan: ahead.Planned, cover: Cover, rows: dict[str, ahead_table.Row]) -> int | None:
    """The shared memory that the table's rows allow a launch; None where no row bounds it."""
    held = [rows[key]["shared_bytes"] for key in cover.bounds(plan.launch) if key in rows]
    more = MORE_BYTES.get((plan.family, plan.launch.kernel.__name__), 0)
    return max(held) + more if held else None


def _beyond(plan: ahead.Planned, allowed: int) -> str:
    """Compiles a launch; what is wrong with what it needs, "" where nothing is."""
    row = ahead.compiled(plan)
    if (why := ahead.too_large(row)) or row["shared_bytes"] <= allowed:
        return why
    return f"{plan.target}: {plan.launch} needs {row['shared_bytes']} bytes, bound by {allowed}"


def main(seed: int, calls: int, compiled: int, table: Path) -> int:
    wrong = [why for target in ahead.TARGETS for why in check(target, seed, calls, compiled, table)]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:4]), Path(sys.argv[4])))
