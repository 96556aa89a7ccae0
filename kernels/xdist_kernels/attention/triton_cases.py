"""Calls that start every kernel of attention with the dims, dtypes and options to compile.

Tensors are on the meta device: under `launch.recording` nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from xdist_kernels.attention import triton as door
from xdist_kernels.attention.dropout import Dropped

_WIDTHS = ((32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
_SOME = ((64, 64), (128, 128), (256, 256))
_TOKENS, _HEADS, _GROUPS = 4096, 8, 2


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a forward and backward call): head dims, dtypes, options."""
    for dtype, widths in (
        (torch.bfloat16, _WIDTHS),
        (torch.float16, _SOME),
        (torch.float32, _SOME),
    ):
        for dim, value_dim in widths:
            yield _named(dtype, dim, value_dim)
    for dim in (64, 128):
        yield _named(torch.float32, dim, dim, precision="tf32x3")
    wide = (torch.bfloat16, 128, 128)
    yield _named(*wide, softcap=True)
    yield _named(*wide, dropout=True)
    yield _named(*wide, into=True)
    yield _named(*wide, sinks=True)
    yield _named(*wide, into=True, sinks=True)
    yield _named(*wide, softcap=True, dropout=True, into=True, sinks=True)
    yield _named(torch.bfloat16, 256, 256, softcap=True, dropout=True, into=True, sinks=True)
    yield _named(torch.float32, 128, 128, softcap=True, dropout=True, into=True, sinks=True)
    yield _named(*wide, narrow=True)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call); ahead.py compiles what `cases` do not cover."""
    yield _named(torch.float32, 32, 32)
    yield _named(torch.bfloat16, 16, 16)


def _named(
    dtype: torch.dtype, dim: int, value_dim: int, *, softcap: bool = False, dropout: bool = False,
    into: bool = False, sinks: bool = False, narrow: bool = False, precision: str = "ieee",
) -> tuple[str, Callable[[], object]]:  # fmt: skip
    flags = {"softcap": softcap, "dropout": dropout, "into": into, "sinks": sinks, "narrow": narrow}
    names = [name for name, on in flags.items() if on]
    if precision != "ieee":
        names.append(precision)
    label = " ".join([str(dtype).removeprefix("torch."), f"{dim}/{value_dim}", *names])
    return label, partial(_call, dtype, dim, value_dim, precision, **flags)


def _call(
    dtype: torch.dtype, dim: int, value_dim: int, precision: str, *, softcap: bool, dropout: bool,
    into: bool, sinks: bool, narrow: bool,
) -> None:  # fmt: skip
    n, heads, groups = _TOKENS, _HEADS, _GROUPS
    q, k, v, dout = (
        torch.empty(1, n, h, d, dtype=dtype, device="meta")
        for h, d in ((heads, dim), (groups, dim), (groups, value_dim), (heads, value_dim))
    )
    at = torch.empty(n, dtype=torch.int64, device="meta")
    dropped = Dropped(0.1, 1, 0, 0, at) if dropout else None
    plans = door.Plans((at, at, at, at), at)
    cap = 30.0 if softcap else None
    made = dtype if narrow else None
    part = None
    if into:
        part = (
            torch.empty(1, n, heads, value_dim, device="meta"),
            torch.empty(1, n, heads, device="meta"),
        )
    out, lse = door.attention_forward(
        q, k, v, scale=1.0, spans=(at, at, at, at), k_positions=at, softcap=cap,
        sinks=torch.empty(heads, device="meta") if sinks else None, dropout=dropped, into=part,
        plans=plans, dtype=made, precision=precision,
    )  # fmt: skip
    door.attention_backward(
        q, k, v, lse, door.attention_delta(out, dout), dout, scale=1.0, spans=(at, at, at, at),
        k_positions=at, softcap=cap, dropout=dropped, plans=plans, dtype=made, precision=precision,
    )  # fmt: skip
