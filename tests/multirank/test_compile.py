"""torch.compile of a model that calls xdist: one graph break a call, and the same numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xdist
from xdist.shard import SequenceShard, resolve
from xdist.testing import RankPool

ROOT = Path(__file__).resolve().parents[2]
LENGTH, DIM, VOCAB = 37, 16, 19
# Before and after the call of each kind of layer; nothing of what a call does is traced.
GRAPHS = 4
CUTS = [0, 5, 5, 23, LENGTH]
MASK = xdist.Mask(causal=False)
# name: mask, layout, documents, options of xdist.attention
CASES: dict[str, tuple[xdist.Mask, str, list[int] | None, dict[str, Any]]] = {
    "ring zigzag": (xdist.Mask(causal=True), "zigzag", None, {"strategy": "ring"}),
    "ulysses packed": (
        xdist.Mask(causal=True, window=6), "contiguous", CUTS, {"strategy": "ulysses"}
    ),
    "gather capped": (xdist.Mask(causal=False), "zigzag", CUTS, {"softcap": 3.0}),
}  # fmt: skip


class Layer(nn.Module):
    """Attention or linear attention between projections. torch compiles no loop with a graph break
    in it: that of the model runs as it is, and each layer is compiled."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        q, k, v = torch.tanh(self.qkv(x)).unflatten(-1, (3, 2, DIM // 2)).unbind(2)
        y = self.call(q, k, v, shard, self.sinks)
        return x + torch.nn.functional.gelu(self.out(y.flatten(-2)))


class Model(nn.Module):
    """Two layers of attention with a recurrence between them, and the loss of the next token."""

    def __init__(self, mask: xdist.Mask, options: dict[str, Any]) -> None:
        super().__init__()

        def attend(q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, sinks: Tensor) -> Tensor:
            return xdist.attention(q, k, v, shard, mask=mask, sinks=sinks, **options)

        def recur(q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, sinks: Tensor) -> Tensor:
            return xdist.linear_attention(q, k * sinks[:, None], v, shard)

        self.tokens = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Layer(call) for call in (attend, recur, attend))

    def forward(self, tokens: Tensor, labels: Tensor, shard: SequenceShard) -> Any:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x, shard)
        return x, xdist.cross_entropy(x, self.tokens.weight, labels, shard)


def both(name: str, backend: str = "aot_eager", ring: int = 1) -> tuple[float, float, int]:
    """Largest differences of outputs and loss, and of gradients, compiled against not; graphs."""
    mask, layout, documents, options = CASES[name]
    torch.manual_seed(1)
    model = Model(mask, options).double()
    tokens, labels = torch.randint(VOCAB, (2, 2, LENGTH))
    shard = resolve(None, LENGTH, documents)
    if ring > 1:
        made = getattr(xdist.Layout, layout)(LENGTH, ring)
        shard = SequenceShard(xdist.init_mesh(ring=ring), made, documents)
    given = (shard.scatter(tokens), shard.scatter(labels), shard)
    graphs = []

    def counted(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    torch._dynamo.reset()
    found = []
    for run in (model, torch.compile(model, backend=counted)):
        model.zero_grad()
        outputs, loss = run(*given)
        (loss + outputs.square().mean()).backward()
        found.append(([outputs.detach(), loss.detach()], [p.grad for p in model.parameters()]))
    torch._dynamo.reset()
    (plain, plain_grads), (compiled, compiled_grads) = found
    return _apart(plain, compiled), _apart(plain_grads, compiled_grads), len(graphs)


def _apart(first: list[Any], second: list[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def every(ring: int) -> list[tuple[float, float, int]]:
    """All cases on one rank, two of them on more."""
    return [both(name, ring=ring) for name in list(CASES)[: 3 if ring == 1 else 2]]


def check(found: list[tuple[float, float, int]]) -> None:
    for outputs, gradients, graphs in found:
        assert outputs < 1e-13
        assert gradients < 1e-12
        assert graphs == GRAPHS


# The compiler looks at .grad of every input and hides the warning itself, but not from an error.
GRAD_OF_NON_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
# torch's own code generator uses what torch deprecates; it says so when it is first imported.
DEPRECATED_BY_TORCH = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@GRAD_OF_NON_LEAF
def test_a_compiled_model_gives_the_same_on_one_rank() -> None:
    check(every(1))


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_on_two_ranks(pool2: RankPool) -> None:
    for found in pool2.run(every, 2):
        check(found)


@GRAD_OF_NON_LEAF
def test_another_shard_documents_and_mask_compile_nothing_anew() -> None:
    graphs = []

    def counted(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return module

    def attend(q: Tensor, shard: SequenceShard, mask: xdist.Mask) -> Tensor:
        return xdist.attention(q * 2, q, q, shard, mask=mask) + 1

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=counted)
    q = torch.randn(1, LENGTH, 2, 4, dtype=torch.float64)
    for documents, mask in (
        (None, xdist.Mask()),
        (CUTS, xdist.Mask(window=3)),
        ([0, LENGTH], MASK),
    ):
        given = (q, resolve(None, LENGTH, documents), mask)
        assert torch.equal(compiled(*given), attend(*given))
    torch._dynamo.reset()
    assert len(graphs) == 2


@pytest.mark.slow
@GRAD_OF_NON_LEAF
@DEPRECATED_BY_TORCH
def test_a_model_compiled_to_code_gives_the_same() -> None:
    outputs, gradients, graphs = both("ring zigzag", "inductor")
    assert outputs < 1e-13
    assert gradients < 1e-12
    assert graphs == GRAPHS


def test_a_full_graph_is_refused_with_the_reason() -> None:
    q = torch.randn(1, 5, 2, 4)
    torch._dynamo.reset()
    whole = torch.compile(
        lambda q: xdist.attention(q, q, q, mask=xdist.Mask()), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="one graph break"):
        whole(q)


def test_the_compiler_is_not_loaded_before_something_is_compiled() -> None:
    code = (
        "import sys, torch, xdist\n"
        "q = torch.randn(1, 3, 1, 2, requires_grad=True)\n"
        "xdist.attention(q, q, q, mask=xdist.Mask()).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    paths = [str(ROOT), str(ROOT / "kernels")]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        check=True,
        timeout=120,
    )
