"""Which calls cuDNN, torch's flash kernel and flash-attn take over, and what they are given.

No GPU is here: the libraries are stand-ins (attention_library_fakes.py) that know their own masks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_library_fakes import HOPPER, install
from tests.kernels.test_attention_library_masks import moved, spans_of
from xdist_kernels import backend
from xdist_kernels.attention import libraries, library_calls, library_masks
from xdist_kernels.attention import torch as door
from xdist_kernels.attention.library_masks import Sequences, find_sequences
from xdist_kernels.errors import KernelError

Call = dict[str, Any]


def shapes(**changed: Any) -> libraries.Shapes:
    base = libraries.Shapes(torch.bfloat16, 1, 4096, 4096, 16, 4, 128, 128, 1 << 23)
    return base._replace(**changed)


def chosen(at: libraries.Here = HOPPER, softcap: float | None = None, n: int = 4096, **mask: Any):
    x = {key: mask.pop(key) for key in list(mask) if key in libraries.Shapes._fields}
    plan = find_sequences(*spans_of(n, **mask))
    return libraries.choose(at, shapes(**({"queries": n, "keys": n} | x)), plan, softcap=softcap)


def test_which_library_takes_which_call() -> None:
    ampere = HOPPER._replace(capability=80)
    bare = HOPPER._replace(flash_attn=None)
    old = bare._replace(cudnn=91002)
    none = bare._replace(cudnn=None, flash_sdpa=False)
    assert chosen().name == "cudnn"
    assert chosen().why == "causal, 1 sequence of 4096 queries in all"
    assert chosen(causal=False).name == "cudnn"
    assert chosen(chunk=512).name == "cudnn"
    assert chosen(left=512).name == "flash_attn"
    assert chosen(bare, left=512).name == "flash_sdpa"
    assert chosen(cuts=(1000, 2000)).name == "flash_attn"
    assert chosen(ampere).name == "flash_attn"
    assert chosen(HOPPER._replace(deterministic=True)).name == "flash_attn"
    assert chosen(softcap=30.0).name == "flash_attn"
    assert chosen(bare, softcap=30.0).name is None
    assert chosen(dim=256, width=256).name == "flash_attn"
    assert chosen(dim=256, width=256, at=HOPPER._replace(capability=89)).name is None
    assert chosen(dim=128, width=64).name == "cudnn"
    assert chosen(dim=192, width=128).name is None
    assert chosen(dim=100, width=100).name is None
    assert chosen(far=1 << 32).name == "flash_attn"
    assert chosen(old).name == "cudnn"
    assert chosen(old, n=4000).name == "flash_sdpa"
    assert chosen(prefix=100).name is None
    assert chosen(none).name is None
    assert chosen(dtype=torch.float32).name is None
    assert chosen(HOPPER._replace(capability=75)).name is None
    assert chosen(HOPPER._replace(flash_attn=(3, 0)), left=9).name == "flash_sdpa"
    refused = chosen(none).why
    assert all(f"{name}: " in refused for name in libraries.LIBRARIES)


def tensors(n: int, m: int, dim: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(n + m)
    shapes = [(2, n, 4, dim), (2, m, 2, dim), (2, m, 2, width), (2, n, 4, width)]
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in shapes]


def library_call(x: list[Tensor], call: Call, **options: Any) -> list[Tensor]:
    """Out, lse and gradients by the library that takes the call."""
    q, k, v, dout = x
    found = libraries.attention_forward(q, k, v, scale=0.3, **call, **options)
    assert found is not None
    grads = libraries.attention_backward(
        q, k, v, *reversed(found), dout, scale=0.3, **call, **options
    )
    assert grads is not None
    return [*found, *grads]


CALLS: dict[str, tuple[Call, str, int, int]] = {
    # name: (mask, who takes it, head dims)
    "causal": ({}, "cudnn", 16, 8),
    "bidirectional": ({"causal": False}, "cudnn", 16, 16),
    "chunks as rows": ({"chunk": 16}, "cudnn", 8, 8),
    "window": ({"left": 7}, "flash_attn", 8, 8),
    "documents": ({"cuts": (11, 40)}, "flash_attn", 8, 8),
    "documents, two sides": (
        {"cuts": (40,), "causal": False, "left": 5, "right": 3},
        "flash_attn",
        8,
        8,
    ),
}


@pytest.mark.parametrize("order", ["as is", "zigzag"])
@pytest.mark.parametrize("name", CALLS)
def test_libraries_give_what_blocks_give(
    name: str, order: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Forward, log-sum-exp and gradients, grouped heads, two rows, every library that serves."""
    calls = install(monkeypatch)
    monkeypatch.setattr(library_masks, "_SHORT", 1)
    mask, taker, dim, width = CALLS[name]
    n = 64
    at = torch.arange(n)
    if order == "zigzag":
        at = torch.cat([at[:16], at[48:], at[16:48]])
    call = moved(spans_of(n, **mask), at, at)
    x = tensors(n, n, dim, width, torch.float16)
    # As one of three in a fused projection, and at addresses that kernels cannot load from.
    x[0] = torch.cat([x[0], x[0], x[0]], dim=3)[..., dim : 2 * dim]
    x[1] = torch.cat([x[1], x[1][..., :1]], dim=3)[..., :dim]
    x[2] = torch.cat([x[2][..., :4], x[2], x[2][..., :4]], dim=3)[..., 4:-4]
    q, k, v, dout = [t.double() for t in x]
    out, lse = door.attention_forward(q, k, v, scale=0.3, form="blockwise", **call)
    delta = door.attention_delta(out, dout)
    grads = door.attention_backward(q, k, v, lse, delta, dout, scale=0.3, form="blockwise", **call)
    wanted = [out, lse, *grads]
    plan = find_sequences(**call)
    assert isinstance(plan, Sequences)
    takers = [taker] + [
        other
        for other in ("flash_attn", "flash_sdpa")
        if other != taker
        and libraries.refusal(other, HOPPER, libraries.shapes_of(*x[:3]), plan, None) is None
    ]
    assert len(takers) >= (2 if dim == width else 1)
    for form in takers:
        calls.clear()
        found = library_call(x, call, form=None if form == taker else form)
        assert calls == [f"{form} forward", f"{form} backward"]
        assert found[1].dtype == torch.float32
        assert found[1].is_contiguous()
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype in (torch.float16, torch.float32)
            # Rounded to float16 once, from an output that was: 2^-11 each.
            assert float((a.double() - b).abs().max() / b.abs().max()) <= 1.5e-3


def test_heads_before_tokens_in_memory(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Tensors of another caller's layout: cuDNN's backward is built for one, and kept."""
    calls = install(monkeypatch)
    spans, at = spans_of(64)
    x = tensors(64, 64, 8, 8, torch.float16)
    call: Call = {"spans": spans, "k_positions": at}
    wanted = library_call(x, call)
    found = library_call([t.transpose(1, 2).contiguous().transpose(1, 2) for t in x], call)
    assert calls == 2 * ["cudnn forward", "cudnn backward"]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_part_of_the_keys_and_soft_cap(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    calls = install(monkeypatch)
    spans, at = spans_of(64, left=9)
    call: Call = {"spans": tuple(s[40:] for s in spans), "k_positions": at[20:], "softcap": 2.0}
    x = tensors(24, 44, 8, 8, torch.float16)
    q, k, v, dout = [t.double() for t in x]
    out, lse = door.attention_forward(q, k, v, scale=0.3, **call)
    grads = door.attention_backward(q, k, v, lse, None, dout, scale=0.3, out=out, **call)
    found = library_call(x, call)
    assert calls == ["flash_attn forward", "flash_attn backward"]
    for a, b in zip(found, [out, lse, *grads], strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) <= 1.5e-3
    # Keys 20..30 are seen by none.
    assert not found[3][:, :11].any()
    assert not found[4][:, :11].any()


def test_who_asks_and_what_keeps_libraries_out(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = tensors(64, 64, 8, 8, torch.bfloat16)
    spans, at = spans_of(64)
    call: Call = {"spans": spans, "k_positions": at}
    assert libraries.take(q, k, v, **call).why == "tensors are on cpu"
    install(monkeypatch)
    assert libraries.take(q, k, v, **call).name == "cudnn"
    for more, why in (
        ({"rounded": False}, "results are added up"),
        ({"drops": True}, "there is dropout"),
        ({"sinks": True}, "a sink would be merged"),
        ({"form": "blockwise"}, "'blockwise' is forced"),
    ):
        taken = libraries.take(q, k, v, **call, **more)  # type: ignore[arg-type]
        assert taken.name is None
        assert taken.why.startswith(why)
    assert libraries.take(q.float(), k.float(), v.float(), **call).name is None
    with pytest.raises(KernelError, match=r"(?s)'cudnn'.*results are added up.*force no form"):
        libraries.take(q, k, v, **call, rounded=False, form="cudnn")
    served = door.attention_forms(q, k, v, **call, rounded=True)
    assert [(x.form, x.start, x.stop, x.heads.stop) for x in served] == [("cudnn", 0, 64, 4)]
    assert served[0].why == "causal, 1 sequence of 64 queries in all"
    assert [x.form for x in door.attention_forms(q, k, v, **call)] == ["flash"]
    # Heads that see alike are one mask, others are left to kernels that know them.
    alike = tuple(s.expand(4, 64) for s in spans)
    assert libraries.take(q, k, v, spans=alike, k_positions=at).name == "cudnn"
    lo = spans[0].repeat(4, 1)
    lo[1] = torch.maximum(lo[1], at - 5)
    unlike = (lo, *alike[1:])
    assert libraries.take(q, k, v, spans=unlike, k_positions=at).why == "heads see different keys"


def test_a_mask_is_read_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spans, at = spans_of(64)
    asked = []
    real = libraries.find_sequences
    monkeypatch.setattr(
        libraries, "find_sequences", lambda *given: [asked.append(1), real(*given)][1]
    )
    first = libraries.sequences_of(spans, at)
    assert libraries.sequences_of(spans, at) is first
    assert len(asked) == 1
    spans[0].add_(0)
    assert libraries.sequences_of(spans, at) is not first
    libraries.sequences_of(spans, at.clone())
    assert len(asked) == 3
    with torch.inference_mode():
        made, at = spans_of(64)
        libraries.sequences_of(made, at)
        libraries.sequences_of(made, at)
    assert len(asked) == 5


def test_a_flash_attn_that_does_not_load_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version = library_calls.flash_attn_version.__wrapped__
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert version() is None
    assert "flash-attn 2.8.3 does not load" in caplog.text
    install(monkeypatch)
    assert version() == (2, 8)
    monkeypatch.undo()
    if importlib.util.find_spec("flash_attn") is None:
        assert version() is None


def test_the_library_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(backend, "_said", set())
    spans, at = spans_of(64)
    x = tensors(64, 64, 8, 8, torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="xdist"):
        for _ in range(2):
            library_call(x, {"spans": spans, "k_positions": at})
    assert [record.getMessage() for record in caplog.records] == [
        "attention forward runs on cudnn: causal, 1 sequence of 64 queries in all",
        "attention backward runs on cudnn: causal, 1 sequence of 64 queries in all",
    ]
