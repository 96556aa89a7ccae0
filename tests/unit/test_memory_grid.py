"""checkpoint_grid on one rank: gradients, kept bytes, the choice of the grid, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xdist
from tests.multirank.grid_cases import (
    DIM,
    DOCUMENTS,
    GRIDS,
    KINDS,
    Case,
    N,
    Residual,
    Weighted,
    build,
    draw,
    expected,
    found,
    gradients,
    kept_beside,
    one_rank,
    plain,
    worst,
)
from xdist.cost import grid as cost
from xdist.documents import Documents
from xdist.errors import ConfigError, ShapeError
from xdist.memory.carry import Carry, NeedsWholeSequence
from xdist.memory.grid import checkpoint_grid, explain
from xdist.memory.grid_cells import Sums


def check(case: Case, shard: xdist.SequenceShard | None) -> None:
    error = worst(found(case, shard), expected(case))
    assert error <= 1e-10, (case, error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_gradients_equal_for_every_recurrence(kind: str, packed: bool) -> None:
    for chunk, group in GRIDS:
        case = Case(f"{kind}+{kind}", chunk, group, packed)
        check(case, one_rank(case.documents))


@pytest.mark.parametrize(
    "stack", ["gla+attention+mamba2+gated_deltanet", "attention+attention", "twice+late"]
)
def test_hybrids_and_layers_with_several_recurrences(stack: str) -> None:
    for packed in (False, True):
        case = Case(stack, 5, 2, packed)
        check(case, one_rank(case.documents))


def test_segments_of_one_rank_in_any_order() -> None:
    layout = xdist.Layout.from_segments(N, [[(20, N), (3, 20), (0, 3)]])
    for documents in (None, DOCUMENTS):
        case = Case("gated_linear+twice", 6, 2, documents is not None)
        shard = xdist.SequenceShard(xdist.mesh.Mesh.one_rank(), layout, documents)
        y, dx, *rest = expected(case)
        own = [y[:, shard.positions], dx[:, shard.positions], *rest]
        assert worst(found(case, shard), own) <= 1e-10


def test_bfloat16_is_as_exact_as_without_checkpoints() -> None:
    stack = "gated_linear+gated_deltanet"
    layout = xdist.Layout.from_segments(N, [[(20, N), (0, 20)]])
    shard = xdist.SequenceShard(xdist.mesh.Mesh.one_rank(), layout)
    errors = []
    for way in ("plain", "grid"):
        layers = build(stack, dtype=torch.bfloat16)
        exact = [layer.double() for layer in build(stack, dtype=torch.bfloat16)]
        x, dy = (t.bfloat16()[:, shard.positions].requires_grad_() for t in draw())
        wide, dwide = (t.bfloat16().double().requires_grad_() for t in draw())
        own = plain(layers, x, shard)
        if way == "grid":
            own = checkpoint_grid(layers, x, shard, chunk_tokens=6, group_layers=2)
        y = plain(exact, wide, None)
        dx, *rest = gradients(y, dwide, wide, exact)
        found = gradients(own, dy, x, layers)
        errors.append(worst(found, [dx[:, shard.positions], *rest]))
    assert errors[1] <= 1.5 * errors[0], errors


@pytest.mark.parametrize("stack", ["gla+gla", "gla+attention"])
def test_a_head_gives_the_sum_and_every_gradient(stack: str) -> None:
    layers, (x, dy) = build(stack), draw()
    x.requires_grad_()
    head = Weighted(DIM, dy).double()
    held = [x, *(p for m in (*layers, head) for p in m.parameters())]
    loss = head(plain(layers, x, None), slice(None))
    reference = torch.autograd.grad(3 * loss, held)
    value = checkpoint_grid(layers, x, chunk_tokens=8, group_layers=1, head=head)
    assert worst([value.detach()], [loss.detach()]) <= 1e-12
    assert worst(torch.autograd.grad(3 * value, held), reference) <= 1e-10


class Embedding(nn.Module):
    """Token numbers [B, n] to [B, n, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, DIM, dtype=torch.float64))

    def forward(self, tokens: Tensor, shard: Any = None) -> Tensor:
        return self.table[tokens]


def test_token_numbers_may_come_in() -> None:
    layers = [Embedding(), *build("gated_linear+gla")]
    tokens = torch.randint(11, (2, N), generator=torch.Generator().manual_seed(0))
    held = [p for layer in layers for p in layer.parameters()]
    dy = draw()[1]
    reference = torch.autograd.grad(plain(layers, tokens, None), held, dy)
    for group in (1, 3):
        y = checkpoint_grid(layers, tokens, chunk_tokens=8, group_layers=group)
        assert worst(torch.autograd.grad(y, held, dy), reference) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_kept_bytes_equal_the_formula(kind: str) -> None:
    dim, tokens = 32, 4096
    layers = build("+".join([kind] * 3), dim, torch.float32)
    x = torch.randn(1, tokens, dim, requires_grad=True)
    grids: list[dict[str, Any]] = [
        {"chunk_tokens": 512, "group_layers": 1},
        {"chunk_tokens": 500, "group_layers": 2},
    ]
    for grid in grids:
        predicted = explain(layers, x, **grid).kept_bytes
        kept = kept_beside(layers, x, None, **grid)
        assert abs(kept - predicted) <= 0.05 * predicted, (grid, kept, predicted)


def test_kept_bytes_of_a_hybrid_and_of_documents() -> None:
    layers = build("gla+attention+mamba2", 32, torch.float32)
    x = torch.randn(1, 1024, 32)
    mesh, layout = xdist.mesh.Mesh.one_rank(), xdist.Layout.contiguous(1024, 1)
    shard = xdist.SequenceShard(mesh, layout, [0, 256, 300, 1024])
    grid: dict[str, Any] = {"chunk_tokens": 64, "group_layers": 2}
    for own in (xdist.SequenceShard(mesh, layout), shard):
        # What queries see is kept by the shard, once for all its calls, and is not the grid's.
        checkpoint_grid(layers, x, own, **grid)
        predicted = explain(layers, x, own, **grid).kept_bytes
        kept = kept_beside(layers, x, own, **grid)
        assert abs(kept - predicted) <= 0.05 * predicted, (kept, predicted)
    assert explain(layers, x, shard, **grid).kept_bytes < explain(layers, x, **grid).kept_bytes


def test_bytes_at_work_follow_the_formula() -> None:
    """What autograd keeps of a cell is linear in its tokens, as the choice of the grid assumes."""
    layers = build("gated_linear+gla+mamba2", 32, torch.float32)
    x = torch.randn(1, 1024, 32, requires_grad=True)
    predicted = explain(layers, x, chunk_tokens=1024, group_layers=3).working_bytes
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    seen = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    y = checkpoint_grid(layers, x, chunk_tokens=1024, group_layers=3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y.backward(torch.ones_like(y))
    measured = sum(storage.nbytes() for storage in seen.values())
    assert abs(measured - predicted) <= 0.05 * predicted, (measured, predicted)


def drawn_problem(generator: torch.Generator) -> cost.Problem:
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    layers = tuple(
        cost.Layer(number(0, 10**6), number(1, 10**5), whole=number(0, 4) == 0)
        for _ in range(number(1, 9))
    )
    tokens, stream = number(1, 40000), number(1, 4096)
    return cost.Problem(tokens, stream, layers, exchanges=number(0, 2) == 1)


def test_the_chosen_grid_is_the_one_of_fewest_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        problem = drawn_problem(generator)
        chosen = cost.choose(problem)
        sizes = range(cost.CHUNK_STEP, problem.tokens + cost.CHUNK_STEP, cost.CHUNK_STEP)
        best = min(
            (grid.kept_bytes + grid.working_bytes, group, -grid.chunk_tokens)
            for group in range(1, len(problem.layers) + 1)
            for grid in (cost.grid(problem, size, group) for size in sizes)
        )
        assert best == (
            chosen.kept_bytes + chosen.working_bytes,
            chosen.group_layers,
            -chosen.chunk_tokens,
        )


def test_critical_grid_of_the_paper() -> None:
    """LS/s + LS/l + ls is least at l = s = (LS)^(1/3), where it is 3 (LS)^(2/3)."""
    # s counts chunk steps here; the costs are such that the three terms are 2^20, 2^20 and 1 each.
    step, layers, tokens = cost.CHUNK_STEP, 512, 2048 * cost.CHUNK_STEP
    problem = cost.Problem(tokens, 1, (cost.Layer(step, 1),) * layers)
    chosen = cost.choose(problem)
    critical = 2 ** (20 / 3)
    assert critical / 1.3 < chosen.chunk_tokens / step < critical * 1.3
    assert critical / 1.3 < chosen.group_layers < critical * 1.3
    total = (chosen.kept_bytes + chosen.working_bytes) / step
    # The first group's stream is not kept, nor the state before the first chunk.
    assert 0.8 * 3 * critical**2 < total < 3 * critical**2
    assert cost.choose(problem, chunk_tokens=512).chunk_tokens == 512
    assert cost.choose(problem, group_layers=3).group_layers == 3


def test_groups() -> None:
    layer, whole = cost.Layer(1, 1), cost.Layer(0, 1, whole=True)
    found = cost.groups([layer, layer, layer, whole, whole, layer], 2)
    assert found == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]


def carry() -> Carry:
    return Carry(8, 12, Documents((0, N)), torch.device("cpu"))


def test_what_needs_the_whole_sequence_refuses_a_chunk() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(NeedsWholeSequence, match=r"\[8, 12\)[\s\S]*layer axis"):
        xdist.attention(q, q, q, carry(), mask=xdist.Mask())
    labels = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(NeedsWholeSequence, match="whole share"):
        xdist.cross_entropy(q.flatten(2), torch.randn(5, 16), labels, carry())
    with pytest.raises(NeedsWholeSequence, match="whole share"):
        xdist.mean(q, carry())
    assert carry().positions.tolist() == [8, 9, 10, 11]


class Own(nn.Module):
    """A layer that handles states itself."""

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        q = x.unflatten(-1, (2, -1))
        out, state = xdist.linear_attention(q, q, q, shard, output_final_state=True)
        return out.flatten(2) + state.mean()


class Backwards(nn.Module):
    """A layer that looks at later tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.ones(DIM, 2, dtype=torch.float64))

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        return xdist.causal_conv1d(x, self.taps, None, shard, reverse=True)


@pytest.mark.parametrize("kind", [Own, Backwards])
def test_layers_that_do_not_go_forward_from_a_state_are_run_whole(kind: type[nn.Module]) -> None:
    layers, (x, dy) = [*build("gla"), kind(), *build("mamba2")], draw()
    with pytest.raises(NeedsWholeSequence, match="goes forward, from the carry's state"):
        layers[1](x[:, 8:12], carry())
    x.requires_grad_()
    reference = gradients(plain(layers, x, None), dy, x, layers)
    y = checkpoint_grid(layers, x, chunk_tokens=8, group_layers=3)
    assert worst(gradients(y, dy, x, layers), reference) <= 1e-10


def test_bad_arguments() -> None:
    x = draw()[0]
    with pytest.raises(ConfigError, match="takes modules"):
        checkpoint_grid([lambda x, shard: x], x)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="chunk_tokens must be at least 1"):
        checkpoint_grid(build("gla"), x, chunk_tokens=0)
    with pytest.raises(ShapeError, match="36 tokens, the shard has 37"):
        checkpoint_grid(build("gla"), x[:, 1:], one_rank(DOCUMENTS))
    layout = xdist.Layout.from_segments(N, [[(20, N), (0, 20)]])
    shard = xdist.SequenceShard(xdist.mesh.Mesh.one_rank(), layout)
    with pytest.raises(ShapeError, match=r"layer 1[\s\S]*reads what a recurrence gave"):
        checkpoint_grid(build("gla+late"), x, shard)


def test_calls_that_change_are_noticed() -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor, shard: Any = None) -> Tensor:
            for _ in range(1 if x.shape[1] != 5 else 2):
                x = xdist.causal_conv1d(x, torch.ones(DIM, 2).to(x), None, shard)
            return x

    with pytest.raises(ShapeError, match="made more calls with a state"):
        checkpoint_grid([Changing()], draw()[0], chunk_tokens=8, group_layers=1)


def test_backward_runs_once() -> None:
    layers, (x, dy) = build("gla"), draw()
    y = checkpoint_grid(layers, x.requires_grad_(), chunk_tokens=8, group_layers=1)
    y.backward(dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        y.backward(dy)


def test_parameters_are_summed_wide() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    sums = Sums([p])
    for _ in range(512):
        sums.add([torch.ones(1, dtype=torch.bfloat16)])
    total = sums.of(p)
    # In bfloat16 the sum would stay at 256.
    assert total is not None
    assert float(total) == 512
    assert total.dtype == torch.bfloat16


def test_autocast_holds_in_backward() -> None:
    layers = [Residual(nn.Identity(), DIM)]
    layers[0].mixer.forward = lambda x, shard: x
    x = draw()[0].float().requires_grad_()
    dy = torch.ones_like(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = plain(layers, x, None), checkpoint_grid(layers, x, chunk_tokens=N, group_layers=1)
    assert worst(gradients(z, dy, x, layers), gradients(y, dy, x, layers)) <= 1e-2
