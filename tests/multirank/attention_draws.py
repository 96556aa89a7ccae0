"""Calls of attention drawn by hypothesis: everything a `Case` can say, in any combination."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st

import xdist
from tests.multirank.attention_cases import Case, Segments, segments
from xdist.mask import Mask, PerHead, Window

# float64 most often: there every fault shows beyond doubt.
DTYPES = [torch.float64] * 5 + [torch.float32, torch.bfloat16, torch.float16]
STRATEGIES = ("ring", "ulysses", "gather", "2d", "halo", "auto")
# Sizes that mean "no limit" to whoever writes them.
FAR = (2**31, 2**63 - 1, 10**30)


@st.composite
def cases(draw: st.DrawFn, parts: int, strategy: str) -> Case:
    """One call by `strategy` on `parts` ranks."""
    # Beyond 256 tokens the kernel works on several blocks; seldom, for the dense reference's sake.
    many = draw(st.integers(0, 15)) == 15
    n = draw(st.integers(0, 400 if many else 40))
    groups = draw(st.integers(1, 1 if many else 3))
    heads = groups * draw(st.integers(1, 2 if many else 4))
    keys = draw(st.sampled_from(["same"] * 4 + ["replicated", "sharded"]))
    # Halo must refuse other keys and masks that see without limit: seldom worth a draw.
    serves = strategy == "halo" and draw(st.integers(0, 9)) < 9
    keys = "same" if serves else keys
    dim = draw(st.integers(1, 6))
    common: dict[str, Any] = {
        "strategy": strategy,
        "layout": draw(splits(n, parts)),
        "n": n,
        "heads": heads,
        "groups": groups,
        "dtype": draw(st.sampled_from(DTYPES)),
        "softcap": draw(st.sampled_from([None, None, 0.7, 30.0])),
        "sinks": draw(st.booleans()),
        "batch": 1 if many else draw(st.sampled_from([1, 2, 1, 2, 1, 2, 0])),
        "dim": dim,
        "value_dim": draw(st.just(dim) | st.integers(1, 6)),
        "ulysses": draw(st.sampled_from([u for u in range(1, parts + 1) if parts % u == 0])),
        "scale": draw(st.sampled_from([None, None, None, 0.2, 1.7, -0.6, 0.0])),
        "strided": draw(st.booleans()),
        "few": draw(st.booleans()),
        "dropout": draw(st.none() | st.none() | dropouts()),
    }
    if strategy in ("ulysses", "auto"):
        common["head_chunks"] = draw(st.sampled_from([1, 1, 2, 3]))
    if keys != "same":
        return draw(cross(keys, parts, **common))
    mask = draw(masks(heads, n, bounded=serves))
    return Case(mask=mask, documents=draw(st.none() | cuts(n)), **common)


@st.composite
def cross(draw: st.DrawFn, keys: str, parts: int, **common: Any) -> Case:
    """Keys of another length, on every rank or in a layout of their own."""
    n, m = common["n"], draw(st.integers(0, 40))
    chunk = draw(st.none() | st.integers(1, 6) | st.integers(1, n + 3) | st.sampled_from(FAR))
    mask = Mask(False, None, draw(st.integers(0, 3)), chunk)
    if keys == "replicated":
        return Case(mask=mask, keys=keys, m=m, **common)
    documents = draw(st.none() | cuts(n))
    count = 1 if documents is None else len(documents) - 1
    inner = sorted(draw(st.integers(0, m)) for _ in range(count - 1))
    return Case(
        mask=mask,
        keys=draw(splits(m, parts)),
        m=m,
        documents=documents,
        key_documents=None if documents is None else (0, *inner, m),
        **common,
    )


def finite(mask: Mask) -> bool:
    """Whether no query sees without limit to either side, by the words of the design."""
    if mask.chunk is not None:
        return True
    windows = mask.window.windows if isinstance(mask.window, PerHead) else [mask.window]
    if mask.prefix or any(w is None for w in windows):
        return False
    sides = [w if isinstance(w, tuple) else (w, w) for w in windows]
    return all(left is not None and (mask.causal or right is not None) for left, right in sides)


@st.composite
def masks(draw: st.DrawFn, heads: int, n: int, *, bounded: bool) -> Mask:
    """Every combination of causal, window, prefix and chunk; sizes also beyond the sequence.

    `bounded` masks see a limited number of tokens to both sides.
    """
    size = st.integers(0, n + 3) | st.integers(0, 8) | st.integers(0, 4) | st.sampled_from(FAR)
    some_chunk = st.integers(1, n + 3) | st.integers(1, 8) | st.integers(2, 5)
    chunk = draw(st.none() | st.none() | some_chunk | st.sampled_from(FAR))
    limited = bounded and chunk is None
    side = size if limited else st.none() | size
    some: st.SearchStrategy[Window] = size | st.tuples(side, side)
    one = some if limited else st.none() | some
    window = draw(one | st.lists(one, min_size=heads, max_size=heads))
    prefix = 0 if limited else draw(st.just(0) | st.just(0) | st.integers(1, 6) | size)
    return Mask(draw(st.booleans()), window, prefix, chunk)


def cuts(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    """cu_seqlens of packed documents, empty ones too."""
    inner = st.lists(st.integers(0, n), max_size=5)
    return inner.map(lambda found: (0, *sorted(found), n))


@st.composite
def splits(draw: st.DrawFn, n: int, parts: int) -> Segments:
    """Contiguous, zigzag, or any runs on any ranks in any order."""
    kind = draw(st.sampled_from(["contiguous", "zigzag", "drawn", "drawn"]))
    if kind == "contiguous":
        return segments(xdist.Layout.contiguous(n, parts))
    if kind == "zigzag":
        return segments(xdist.Layout.zigzag(n, parts))
    ends = sorted(draw(st.lists(st.integers(0, n), max_size=min(2 * parts, 10))))
    runs = [(a, b) for a, b in pairwise([0, *ends, n]) if b > a]
    held: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for number in draw(st.permutations(range(len(runs)))):
        held[draw(st.integers(0, parts - 1))].append(runs[number])
    return tuple(tuple(rank) for rank in held)


@st.composite
def dropouts(draw: st.DrawFn) -> xdist.Dropout:
    """Any rate and numbers of up to 64 bits."""
    number = st.integers(0, 3) | st.integers(0, 2**64 - 1)
    rate = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    row = draw(st.integers(0, 3) | st.integers(0, 2**40))
    return xdist.Dropout(rate, draw(number), draw(number), draw(number), row)
