"""xdist.attention given what users give it by accident: the plain result, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import xdist
from xdist import Mask
from xdist.errors import ShapeError
from xdist.mesh import Mesh
from xdist.parallel.attention import explain
from xdist.shard import SequenceShard

N, HEADS, DIM = 140, 2, 8
# Long enough that each is served by another form of the kernels: torch's own, the window, blocks.
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"mask": Mask()},
    "window": {"mask": Mask(window=9)},
    "blocks": {"mask": Mask(causal=False), "softcap": 2.0},
    "pieces": {"mask": Mask(prefix=40, window=70)},
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors `[2, N, HEADS, DIM]` that lie in memory in unusual ways."""

    def made(*shape: int) -> Tensor:
        return draw(*shape, dtype=dtype)

    shape = (2, N, HEADS, DIM)
    return {
        "one row for all rows": made(1, N, HEADS, DIM).expand(shape),
        "one token for all tokens": made(2, 1, HEADS, DIM).expand(shape),
        "one head for all heads": made(2, N, 1, DIM).expand(shape),
        "one number for all channels": made(2, N, HEADS, 1).expand(shape),
        "one number for all": made(1, 1, 1, 1).expand(shape),
        "tokens that overlap": made(4 * N * HEADS * DIM).as_strided(shape, (3, 1, 2, 4)),
        "every other channel": made(2, N, HEADS, 2 * DIM)[..., ::2],
        "every other token": made(2, 2 * N, HEADS, DIM)[:, ::2],
        "channels before heads": made(2, N, DIM, HEADS).transpose(2, 3),
        "tokens last": made(2, HEADS, DIM, N).permute(0, 3, 1, 2),
        "behind an offset": made(2, N + 3, HEADS + 1, DIM + 5)[:, 3:, 1:, 5:],
        "an imaginary part": torch.view_as_complex(made(*shape, 2)).conj().imag,
    }


def run(given: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients of q, k and v, the last of `given` is the output's gradient; q, k and v
    are leaves as they lie."""
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out = xdist.attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def check_view(form: str, name: str, place: int, dtype: torch.dtype) -> None:
    given = [draw(2, N, HEADS, DIM, seed=i + 1, dtype=dtype) for i in range(4)]
    given[place] = views(dtype)[name]
    plain = [torch.empty(x.shape, dtype=dtype).copy_(x) for x in given]
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    found, wanted = run(given, **FORMS[form]), run(plain, **FORMS[form])
    for a, b in zip(found, wanted, strict=True):
        # Inputs are of order 1: where terms cancel (keys that are all the same) rounding is left.
        gap = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
        assert gap <= limit, (form, name, place, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_how_tensors_lie_in_memory_does_not_matter(form: str) -> None:
    for number, name in enumerate(views(torch.float64)):
        check_view(form, name, number % 4, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_how_each_tensor_lies_in_memory_does_not_matter(form: str) -> None:
    """q, k, v and the output's gradient in turn, in each way."""
    for name, place in product(views(torch.float32), range(4)):
        check_view(form, name, place, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_need_not_be_positive(form: str) -> None:
    """Scores of the opposite sign, and scores that are all zero: what is hidden stays hidden."""
    q, k, v, dout = (draw(1, N, HEADS, DIM, seed=i) for i in range(4))
    minus = run([q, k, v, dout], scale=-0.3, **FORMS[form])
    plus = run([-q, k, v, dout], scale=0.3, **FORMS[form])
    plus[1] = -plus[1]
    none = run([q, k, v, dout], scale=0.0, **FORMS[form])
    zero = run([torch.zeros_like(q), k, v, dout], **FORMS[form])
    for found, wanted in ((minus, plus), (none[:1], zero[:1]), (none[3:], zero[3:])):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert all(bool(x.isfinite().all()) for x in found)
    assert not none[1].any()
    assert not none[2].any()


def inputs(dtype: torch.dtype = torch.float64, n: int = 30) -> dict[str, Tensor]:
    shapes = {"q": (2, n, 4, 6), "k": (2, n, 2, 6), "v": (2, n, 2, 5), "sinks": (4,)}
    return {name: draw(*s, seed=i, dtype=dtype) for i, (name, s) in enumerate(shapes.items())}


STRATEGIES = ("ulysses", "ring", "gather", "halo", "2d")


def call(x: dict[str, Tensor], strategy: str = "auto", **options: Any) -> Tensor:
    return xdist.attention(**x, mask=Mask(window=7), strategy=strategy, **options)


def test_gradients_of_some_inputs_are_those_of_all() -> None:
    whole = {name: x.requires_grad_() for name, x in inputs().items()}
    dout = draw(2, 30, 4, 5, seed=9)
    wanted = dict(
        zip(whole, torch.autograd.grad(call(whole), [*whole.values()], dout), strict=True)
    )
    for strategy, bits in product(STRATEGIES, range(1, 16)):
        some = {name for i, name in enumerate(whole) if bits >> i & 1}
        x = {name: x.requires_grad_(name in some) for name, x in inputs().items()}
        out = call(x, strategy)
        out.backward(dout)
        for name, tensor in x.items():
            if name in some:
                assert tensor.grad is not None
                torch.testing.assert_close(tensor.grad, wanted[name], rtol=1e-10, atol=1e-12)
            else:
                assert tensor.grad is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_again_only_where_the_graph_is_kept(strategy: str) -> None:
    chunks = (1, 3) if strategy == "ulysses" else (1,)
    for head_chunks in chunks:
        x = {name: t.requires_grad_() for name, t in inputs().items()}
        loss = call(x, strategy, head_chunks=head_chunks).square().sum()
        first = torch.autograd.grad(loss, [*x.values()], retain_graph=True)
        second = torch.autograd.grad(loss, [*x.values()])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, [*x.values()])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputed_and_offloaded_backward_is_the_same(strategy: str) -> None:
    def gradients(run: Callable[..., Tensor]) -> list[Any]:
        x = [t.requires_grad_() for t in inputs().values()]
        run(*x).square().sum().backward()
        return [t.grad for t in x]

    def plain(*given: Tensor) -> Tensor:
        return call(dict(zip(inputs(), given, strict=True)), strategy)

    wanted = gradients(plain)
    for reentrant in (False, True):
        again = gradients(lambda *given, r=reentrant: checkpoint(plain, *given, use_reentrant=r))
        assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))
    with torch.autograd.graph.save_on_cpu():
        again = gradients(plain)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_without_gradients_the_output_is_the_same() -> None:
    x = inputs()
    wanted = call({name: t.clone().requires_grad_() for name, t in x.items()})
    for strategy, mode in product(STRATEGIES, (torch.no_grad, torch.inference_mode)):
        with mode():
            found = call(x, strategy)
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-14)
        assert not found.requires_grad


def test_a_shard_first_met_in_inference_mode_trains_afterwards() -> None:
    """What it keeps of positions may be saved by autograd later."""
    shard = SequenceShard(xdist.Mesh.one_rank(), xdist.Layout.zigzag(30, 1), [0, 11, 30])
    with torch.inference_mode():
        before = call(inputs(), shard=shard)
        kept = shard.positions, shard.document_positions
    assert not any(x.is_inference() for x in kept)
    table = nn.Embedding(30, 6, dtype=torch.float64)
    x = inputs()
    placed = x["q"] + sum(table(at) for at in kept)[None, :, None]
    out = call(x | {"q": placed}, shard=shard)
    out.sum().backward()
    assert table.weight.grad is not None
    x = {name: t.requires_grad_() for name, t in inputs().items()}
    assert torch.equal(call(x, shard=shard), before)


def attend(q: Tensor) -> Tensor:
    return call(GIVEN | {"q": q})


def total(q: Tensor) -> Tensor:
    return attend(q).sum()


def forward_mode(q: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        attend(torch.autograd.forward_ad.make_dual(q, q))


def batched(q: Tensor) -> None:
    q = q.requires_grad_()
    out = attend(q)
    torch.autograd.grad(out, q, torch.ones(3, *out.shape), is_grads_batched=True)


# Drawn once: torch.func refuses to draw inside, which would be another error than the one meant.
GIVEN = inputs()
TRANSFORMS = "autograd.Function with functorch transforms"
# What is called, and what torch says of it.
FUNCTIONAL: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "func.grad": (torch.func.grad(total), RuntimeError, TRANSFORMS),
    "func.vjp": (lambda q: torch.func.vjp(attend, q), RuntimeError, TRANSFORMS),
    "func.jvp": (lambda q: torch.func.jvp(attend, (q,), (q,)), RuntimeError, TRANSFORMS),
    "func.jacrev": (torch.func.jacrev(attend), RuntimeError, TRANSFORMS),
    "vmap": (lambda q: torch.func.vmap(attend)(q[None]), RuntimeError, TRANSFORMS),
    "forward mode": (forward_mode, NotImplementedError, "must implement the jvp function"),
    "batched gradients": (batched, RuntimeError, "Batching rule not implemented"),
}


# What torch loads for forward mode uses what torch deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_what_is_no_plain_backward_raises(name: str) -> None:
    run, error, words = FUNCTIONAL[name]
    with pytest.raises(error, match=words):
        run(GIVEN["q"].clone())


class Layer(nn.Module):
    """Holds its shard, as a model that is trained on one layout may."""

    def __init__(self, shard: SequenceShard) -> None:
        super().__init__()
        self.shard = shard
        self.qkv = nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return xdist.attention(q, k, v, self.shard, mask=Mask()).flatten(2)


def test_copies_of_a_module_share_its_shard() -> None:
    shard = SequenceShard(xdist.Mesh.one_rank(), xdist.Layout.contiguous(9, 1), [0, 4, 9])
    layer, x = Layer(shard), draw(2, 9, 8)
    first = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.shard is shard
    assert twin.qkv.weight is not layer.qkv.weight
    assert torch.equal(twin(x), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sinks_may_have_another_float_dtype(dtype: torch.dtype) -> None:
    x = inputs(torch.float32)
    x["sinks"] = x["sinks"].bfloat16().to(dtype).requires_grad_()
    wanted = call(x | {"sinks": x["sinks"].float()})
    out = call(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, wanted)
    (grad,) = torch.autograd.grad(out.sum(), x["sinks"])
    assert grad.dtype == dtype


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_of_a_tracing_mode_is_kept(sharded: bool, backend: str) -> None:
    def new_shard() -> SequenceShard:
        return SequenceShard(Mesh.one_rank(), xdist.Layout.contiguous(9, 1), (0, 4, 9))

    def attended(shard: SequenceShard) -> Tensor:
        q = draw(1, 9, 2, 4, dtype=torch.float32)
        given = shard if sharded else None
        return xdist.attention(q, q, q, given, mask=Mask(window=8), backend=backend)

    def others(shard: SequenceShard) -> tuple[Tensor, ...]:
        x, weight = draw(1, 9, 8), draw(8, 3)
        reverse = xdist.causal_conv1d(x, weight, None, shard if sharded else None, reverse=True)
        return shard.positions, shard.document_positions, reverse

    shard, untouched = new_shard(), new_shard()
    with FakeTensorMode():
        shapes = [x.shape for x in others(shard)]
        with suppress(RuntimeError, UserWarning):  # who looks at values cannot be traced
            attended(shard)
    assert torch.equal(attended(shard), attended(untouched))
    for traced, a, b in zip(shapes, others(shard), others(untouched), strict=True):
        assert torch.equal(a, b)
        assert traced == a.shape
    with FakeTensorMode():  # what is kept of real calls does not stand in the way
        assert shapes == [x.shape for x in others(shard)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_sink_of_minus_infinity_takes_nothing(backend: str) -> None:
    """Also of a query that sees no key, for which there is then nothing at all."""
    shards = [
        SequenceShard(Mesh.one_rank(), xdist.Layout.contiguous(n, 1), documents)
        for n, documents in ((4, [0, 2, 4]), (3, [0, 0, 3]))
    ]
    q, k = (draw(1, n, 2, 4).requires_grad_() for n in (4, 3))
    sinks = torch.tensor([-torch.inf, 0.3], dtype=torch.float64, requires_grad=True)
    options = {"mask": Mask(causal=False), "key_shard": shards[1], "backend": backend}
    out = xdist.attention(q, k, k, shards[0], sinks=sinks, **options)
    found = torch.autograd.grad(out.square().sum(), (q, k, sinks))
    plain = xdist.attention(q, k, k, shards[0], **options)
    wants = torch.autograd.grad(plain.square().sum(), (q, k))
    assert found[2][0] == 0.0
    assert found[2][1].isfinite()
    assert torch.equal(out[:, :, 0], plain[:, :, 0])
    for own, want in zip(found, wants, strict=False):
        torch.testing.assert_close(own[:, :, 0], want[:, :, 0])


def test_what_is_no_tensor_or_no_shard_of_a_sequence_is_refused() -> None:
    q, one = draw(2, 9, 2, 4), Mesh.one_rank()
    for calling in (xdist.attention, explain):
        for shard in (xdist.GridShard(one, (9,), 0), one, Mask()):
            name = type(shard).__name__
            with pytest.raises(ShapeError, match=f"takes a SequenceShard or None\ngot {name}"):
                calling(q, q, q, shard, mask=Mask())  # type: ignore[arg-type]
        for given, name in (((q.numpy(), q, q), "q"), ((q, q, None), "v")):
            with pytest.raises(ShapeError, match=f"{name} must be a tensor"):
                calling(*given, mask=Mask())  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="sinks must be a tensor\ngot list"):
        xdist.attention(q, q, q, mask=Mask(), sinks=[0.0, 0.0])  # type: ignore[arg-type]
