"""Bad input to attention: every rank raises the same error, with the numbers, and sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import xdist
from xdist.errors import ConfigError, DocumentsError, LayoutError, MaskError, ShapeError
from xdist.errors import StrategyError as Refused
from xdist.mask import Mask
from xdist.testing import RankPool

N, PARTS = 8, 2
FULL = Mask(causal=False)


def good(shard: xdist.SequenceShard) -> dict[str, Any]:
    """Arguments that pass: q `[2,4,4,3]`, k and v of two heads."""
    return {
        "q": torch.zeros(2, 4, 4, 3),
        "k": torch.zeros(2, 4, 2, 3),
        "v": torch.zeros(2, 4, 2, 3),
        "shard": shard,
        "mask": Mask(),
    }


def other(length: int, documents: list[int] | None = None) -> xdist.SequenceShard:
    """Another shard of the same ranks."""
    mesh = xdist.init_mesh(ring=PARTS)
    return xdist.SequenceShard(mesh, xdist.Layout.contiguous(length, PARTS), documents)


# What is wrong: the class of error, words or numbers it must say, and the arguments that differ.
CALLS: dict[str, tuple[type[ConfigError], str, Callable[[], dict[str, Any]]]] = {
    "three dims": (ShapeError, "(2, 4, 3)", lambda: {"q": torch.zeros(2, 4, 3)}),
    "another batch": (ShapeError, "(3, 4, 2, 3)", lambda: {"k": torch.zeros(3, 4, 2, 3)}),
    "fewer values": (ShapeError, "(2, 3, 2, 3)", lambda: {"v": torch.zeros(2, 3, 2, 3)}),
    "another head dim": (ShapeError, "(2, 4, 4, 5)", lambda: {"q": torch.zeros(2, 4, 4, 5)}),
    "heads that do not divide": (
        ShapeError, "5 query heads, 2 key heads", lambda: {"q": torch.zeros(2, 4, 5, 3)}),
    "no heads": (ShapeError, "0 query heads", lambda: {"q": torch.zeros(2, 4, 0, 3)}),
    "integers": (
        ShapeError, "int64", lambda: {x: torch.zeros(2, 4, 2, 3).long() for x in "qkv"}),
    "no head dim": (
        ShapeError, "(2, 4, 4, 0)",
        lambda: {"q": torch.zeros(2, 4, 4, 0), "k": torch.zeros(2, 4, 2, 0)}),
    "eight bits": (
        ShapeError, "float8_e4m3fn",
        lambda: {x: torch.zeros(2, 4, 2, 3).to(torch.float8_e4m3fn) for x in "qkv"}),
    "two dtypes": (ShapeError, "float64", lambda: {"k": torch.zeros(2, 4, 2, 3).double()}),
    "two devices": (ShapeError, "meta", lambda: {"v": torch.zeros(2, 4, 2, 3, device="meta")}),
    "another device than the mesh": (
        ShapeError, "the mesh is on cpu",
        lambda: {x: torch.zeros(2, 4, 2, 3, device="meta") for x in "qkv"}),
    "sinks of other heads": (ShapeError, "(2,)", lambda: {"sinks": torch.zeros(2)}),
    "integer sinks": (ShapeError, "int64", lambda: {"sinks": torch.zeros(4).long()}),
    "sinks elsewhere": (ShapeError, "meta", lambda: {"sinks": torch.zeros(4, device="meta")}),
    "a shard of another length": (ShapeError, "of 10", lambda: {"shard": other(10)}),
    "keys of another length": (
        ShapeError, "5 tokens", lambda: {x: torch.zeros(2, 5, 2, 3) for x in "kv"}),
    "a key shard of another length": (
        ShapeError, "of 12", lambda: {"mask": FULL, "key_shard": other(12)}),
    "a key shard of other documents": (
        MaskError, "1 query documents, 2 key documents",
        lambda: {"mask": FULL, "key_shard": other(N, [0, 3, N])}),
    "replicated keys of several documents": (
        MaskError, "2 query documents, 1 key documents",
        lambda: {"mask": FULL, "shard": other(N, [0, 3, N]), "key_shard": "replicated"}),
    "a key shard that is no shard": (
        ShapeError, "'elsewhere'", lambda: {"mask": FULL, "key_shard": "elsewhere"}),
    "causal over other keys": (MaskError, "causal=True", lambda: {"key_shard": other(N)}),
    "a window over other keys": (
        MaskError, "window=3",
        lambda: {"mask": Mask(causal=False, window=3), "key_shard": "replicated"}),
    "windows of other heads": (
        MaskError, "3 windows for 4 heads", lambda: {"mask": Mask(window=[1, 2, 3])}),
    "no mask": (MaskError, "NoneType", lambda: {"mask": None}),
    "a dense mask": (MaskError, "Tensor", lambda: {"mask": torch.ones(8, 8)}),
    "soft-cap 0": (ShapeError, "0.0", lambda: {"softcap": 0.0}),
    "soft-cap NaN": (ShapeError, "nan", lambda: {"softcap": float("nan")}),
    "soft-cap infinite": (ShapeError, "inf", lambda: {"softcap": float("inf")}),
    "scale infinite": (ShapeError, "inf", lambda: {"scale": float("inf")}),
    "scale per head": (ShapeError, "Tensor", lambda: {"scale": torch.ones(4)}),
    "dropout as a rate": (ShapeError, "float", lambda: {"dropout": 0.1}),
    "no chunk of heads": (ShapeError, "0", lambda: {"head_chunks": 0}),
    "half a chunk of heads": (ShapeError, "1.5", lambda: {"head_chunks": 1.5}),
    "chunks of heads in a ring": (
        Refused, "head_chunks=2", lambda: {"head_chunks": 2, "strategy": "ring"}),
    "an unknown strategy": (Refused, "'rings'", lambda: {"strategy": "rings"}),
    "halo without an end": (Refused, "unlimited to the left", lambda: {"strategy": "halo"}),
    "halo over other keys": (
        Refused, "share the queries' positions",
        lambda: {"mask": FULL, "key_shard": other(N), "strategy": "halo"}),
}  # fmt: skip


def refusals() -> dict[str, tuple[str, str, int, int]]:
    """On one rank, of each call: the error's class, its text, messages and bytes sent by then."""
    shard, found = other(N), {}
    for name, (_, _, changes) in CALLS.items():
        arguments = {**good(shard), **changes()}
        with xdist.comm.ledger() as moved:
            try:
                xdist.attention(**arguments)
            except Exception as error:
                said = str(error).replace(f"rank {shard.rank}", "rank r")
                found[name] = type(error).__name__, said, moved.calls, moved.sent_bytes
            else:
                found[name] = "nothing", "", moved.calls, moved.sent_bytes
    xdist.attention(**good(shard))  # what was refused left nothing on its way
    return found


APART: dict[str, dict[str, Any]] = {
    "mask": {"mask": Mask(window=2)},
    "dtype": {x: torch.zeros(2, 4, 2, 3).double() for x in "qkv"},
    "batch": {x: torch.zeros(1, 4, 2, 3) for x in "qkv"},
    "strategy": {"strategy": "gather"},
    "soft-cap": {"softcap": 2.0},
    "dropout": {"dropout": xdist.Dropout(0.1, seed=3)},
    "chunks of heads": {"head_chunks": 2},
    # One rank's backward would wait for gradients that no other rank sends.
    "gradients": {"q": torch.zeros(2, 4, 4, 3, requires_grad=True)},
}


def apart() -> dict[str, tuple[str, str, int]]:
    """On one rank, of calls that differ on rank 1: the error's class, its text and bytes sent."""
    shard, found = other(N), {}
    for name, changes in APART.items():
        arguments = {**good(shard), **(changes if shard.rank == 1 else {})}
        with xdist.checks(), xdist.comm.ledger() as moved:
            try:
                xdist.attention(**arguments)
            except Exception as error:
                found[name] = type(error).__name__, str(error), moved.sent_bytes
    return found


def test_checks_refuse_ranks_that_make_different_calls(pool2: RankPool) -> None:
    first, second = pool2.run(apart)
    for name in APART:
        assert first[name][0] == second[name][0] == "DesyncError"
        assert first[name][2] == second[name][2] == 0
        assert "sequence ranks [1]" in first[name][1]


def test_bad_calls_raise_alike_on_all_ranks_before_anything_is_sent(pool2: RankPool) -> None:
    first, second = pool2.run(refusals)
    assert first == second
    for name, (kind, words, _) in CALLS.items():
        raised, said, calls, sent = first[name]
        assert (raised, calls, sent) == (kind.__name__, 0, 0), (name, first[name])
        assert words in said, (name, said)


@pytest.mark.parametrize(
    ("documents", "numbers"),
    [
        ([0, 3, 7], "starts at 0 and ends at 7"),
        ([0, 3, 9], "ends at 9"),
        ([1, 3, 8], "starts at 1"),
        ([0, 5, 3, 8], "entry 1 is 5, entry 2 is 3"),
        ([0, -1, 8], "is -1"),
        ([8], "at least two entries"),
        ([0, 2.5, 8], "float"),
        (torch.tensor([[0, 8]]), "list"),
    ],
    ids=str,
)
def test_documents_that_do_not_add_up_are_refused(documents: Any, numbers: str) -> None:
    with pytest.raises(DocumentsError, match=numbers):
        xdist.SequenceShard(xdist.init_mesh(), xdist.Layout.contiguous(N, 1), documents)


BAD_SHARDS: dict[str, tuple[type[ConfigError], Callable[[], Any]]] = {
    "documents of another length": (DocumentsError, lambda: other(N, [0, 3, 7])),
    "documents that go back": (DocumentsError, lambda: other(N, [0, 5, 3, 8])),
    "a layout of other ranks": (
        LayoutError,
        lambda: xdist.SequenceShard(
            xdist.init_mesh(ring=PARTS), xdist.Layout.contiguous(N, PARTS + 1)
        ),
    ),
    "positions held twice": (
        LayoutError,
        lambda: xdist.Layout.from_segments(N, [[(0, 5)], [(4, 8)]]),
    ),
    "positions held by nobody": (
        LayoutError,
        lambda: xdist.Layout.from_segments(N, [[(0, 3)], [(4, 8)]]),
    ),
}


def refused_shards() -> dict[str, tuple[str, str, int]]:
    """On one rank: class, text and control bytes sent by then."""
    xdist.init_mesh(ring=PARTS)
    found = {}
    for name, (_, make) in BAD_SHARDS.items():
        with xdist.comm.ledger() as moved:
            try:
                make()
            except ConfigError as error:
                found[name] = type(error).__name__, str(error), moved.control_bytes
    return found


def test_bad_shards_raise_alike_on_all_ranks_before_anything_is_sent(pool2: RankPool) -> None:
    first, second = pool2.run(refused_shards)
    assert first == second
    assert {name: (kind, sent) for name, (kind, _, sent) in first.items()} == {
        name: (kind.__name__, 0) for name, (kind, _) in BAD_SHARDS.items()
    }


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"window": -1}, "-1"),
        ({"window": (3, -2)}, "-2"),
        ({"window": (1, 2, 3)}, "3 entries"),
        ({"window": []}, "empty"),
        ({"window": [1, -3]}, "-3"),
        ({"window": 1.5}, "1.5"),
        ({"window": "all"}, "all"),
        ({"window": False}, "False"),
        ({"chunk": True}, "True"),
        ({"prefix": -1}, "-1"),
        ({"prefix": 0.5}, "0.5"),
        ({"chunk": 0}, "got 0"),
        ({"chunk": -4}, "-4"),
        ({"causal": None}, "None"),
        ({"causal": "no"}, "no"),
    ],
    ids=str,
)
def test_masks_that_contradict_themselves_are_refused(options: Any, numbers: str) -> None:
    with pytest.raises(MaskError, match=numbers):
        Mask(**options)
