"""Attention over sets of a grid on one device: against the loop and the papers' reshapes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xdist.testing import relative_error
from xdist_kernels.errors import KernelError
from xdist_kernels.neighborhood import torch as kernel
from xdist_kernels.neighborhood.reference import near, sets_reference
from xdist_kernels.neighborhood.rules import Blocks, Near, Rule, Strided, span
from xdist_kernels.neighborhood.tiles import rows_of, runs_of

RULES = (
    *(Near(n, w, d) for n, w, d in ((1, 1, 1), (7, 7, 1), (11, 3, 3), (12, 3, 2), (14, 5, 1))),
    *(Blocks(n, w, s) for n, w, s in ((9, 4, 0), (9, 4, 3), (3, 5, 2), (8, 4, 2), (5, 1, 0))),
    *(Strided(n, s) for n, s in ((9, 2), (9, 4), (3, 3), (0, 1), (8, 1))),
)


def draw(sizes: Sequence[int], heads: int = 2, groups: int = 2, seed: int = 0) -> list[Tensor]:
    """q, k, v, dout with head dims 3 and 2."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, 3), (groups, 3), (groups, 2), (heads, 2))
    return [torch.randn(2, *sizes, *s, generator=g, dtype=torch.float64) for s in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor, rules: Sequence[Rule]) -> Tensor:
    runs = [
        runs_of(rule, 0, rule.size, 0, n) for rule, n in zip(rules, rows_of(rules), strict=True)
    ]
    return kernel.forward(q, k, v, runs=runs, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tiles_hold_each_query_once_with_exactly_its_keys(rule: Rule) -> None:
    """For any run of queries and any size of tiles; the span is from the first to the last key."""
    n = rule.size
    for start, stop, most in itertools.product(range(n + 1), range(n + 1), (1, 2, 3, 100)):
        low, high = span(rule, start, stop)
        found: dict[int, list[int]] = {}
        for run in runs_of(rule, start, stop, low, most):
            assert run.rows <= most
            alike = itertools.product(range(run.classes), range(run.tiles), range(run.rows))
            for kind, tile, row in alike:
                ahead = kind + tile * run.hop
                query = start + run.queries + ahead + row * run.step
                first, last = (0, run.columns) if run.seen is None else run.seen[row]
                keys = [low + run.keys + ahead + c * run.step for c in range(first, last)]
                assert query not in found
                assert keys[0] - query == (run.offset + first - row) * run.step
                found[query] = keys
        wanted = {}
        for query in range(start, stop):
            first, count = rule.keys(query)
            wanted[query] = [first + i * rule.step for i in range(count)]
        assert found == wanted
        if start < stop:
            seen = [key for keys in wanted.values() for key in keys]
            assert (low, high) == (min(seen), max(seen) + 1)


@pytest.mark.parametrize(
    ("size", "window", "dilation"), [(9, 3, 1), (11, 5, 2), (9, 3, 3), (6, 5, 1)]
)
def test_a_neighbourhood_is_the_nearest_of_its_class(size: int, window: int, dilation: int) -> None:
    rule = Near(size, window, dilation)
    for position, keys in enumerate(near(size, window, dilation)):
        first, count = rule.keys(position)
        assert [first + i * dilation for i in range(count)] == keys


def test_every_query_sees_exactly_the_window(poisoned: None) -> None:
    """Equal scores and one-hot values: a row of 1 / window^k for window^k keys."""
    sizes = (5, 6, 7)
    n = torch.Size(sizes).numel()
    q, k = torch.zeros(2, 1, *sizes, 1, 4)
    v = torch.eye(n).view(1, *sizes, 1, n)
    weights = attend(q, k, v, [Near(5, 5), Near(6, 3, 2), Near(7, 3)]).view(n, n)
    assert torch.equal((weights > 0).sum(1), torch.full((n,), 45))
    assert torch.allclose(weights.sum(1), torch.ones(n))


@pytest.mark.parametrize("scores", [1, 300, 2**19])
def test_parts_of_any_size_give_the_loops_result(
    scores: int, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Forward and every gradient, overlapping tiles included; key heads shared by two."""
    monkeypatch.setattr(kernel, "PART_SCORES", scores)
    rules = (Near(9, 3, 2), Near(7, 3))
    q, k, v, dout = draw((9, 7), heads=4)
    runs = [runs_of(rule, 0, rule.size, 0, 2) for rule in rules]
    bias = torch.randn(4, 5, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    sees = [near(9, 3, 2), near(7, 3)]
    out = sets_reference(q, k, v, sees, position_bias=bias, steps=(2, 1))
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    with torch.no_grad():
        options = {"runs": runs, "scale": 3**-0.5, "bias": bias}
        found = [kernel.forward(q, k, v, **options)]
        found += kernel.backward(q, k, v, dout, **options)
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-12


def test_shifted_blocks_are_the_cyclic_shift_with_its_mask() -> None:
    """Swin as published: roll, cut into windows, mask what only the roll brought together, roll
    back."""
    size, window, shift = 8, 4, 2
    q, k, v, _ = draw((size, size))
    region = torch.zeros(size, dtype=torch.int64)
    region[size - window : size - shift], region[size - shift :] = 1, 2
    number = (3 * region[:, None] + region).expand(1, size, size)[..., None, None]

    def windows(x: Tensor, rolled: bool) -> Tensor:
        """[B, windows, H, window^2, D]"""
        x = x if rolled else x.roll((-shift, -shift), (1, 2))
        x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2).transpose(2, 3)

    mine = windows(number, rolled=True)[..., 0]
    mask = mine[..., :, None] == mine[..., None, :]
    y = scaled_dot_product_attention(*(windows(x, False) for x in (q, k, v)), attn_mask=mask)
    y = y.transpose(2, 3).unflatten(1, (2, 2)).unflatten(3, (window, window)).transpose(2, 3)
    y = y.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))
    rules = [Blocks(size, window, shift)] * 2
    assert relative_error(attend(q, k, v, rules), y) < 1e-12


def test_strided_sets_are_maxvits_grid() -> None:
    """As published: [grid, size / grid] per dim, attention over the first of each pair."""
    size, grid = 8, 4
    q, k, v, _ = draw((size, size))

    def sets(x: Tensor) -> Tensor:
        x = x.unflatten(2, (grid, -1)).unflatten(1, (grid, -1))  # B, g, n/g, g, n/g, H, D
        return x.permute(0, 2, 4, 5, 1, 3, 6).flatten(4, 5)

    y = scaled_dot_product_attention(*(sets(x) for x in (q, k, v))).unflatten(4, (grid, grid))
    y = y.permute(0, 4, 1, 5, 2, 3, 6).flatten(3, 4).flatten(1, 2)
    assert relative_error(attend(q, k, v, [Strided(size, size // grid)] * 2), y) < 1e-12


def test_nothing_as_large_as_a_copied_window_is_made() -> None:
    """The largest tensor of forward and backward stays far below n x window^3 x D."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out._base is None:
                self.elements = max(self.elements, out.numel())
            return out

    sizes, window, width = (16, 16, 16), 5, 8
    x = torch.randn(1, *sizes, 1, width)
    rules = [Near(n, window) for n in sizes]
    runs = [runs_of(r, 0, r.size, 0, n) for r, n in zip(rules, rows_of(rules), strict=True)]
    with Largest() as seen:
        out = kernel.forward(x, x, x, runs=runs, scale=1.0)
        kernel.backward(x, x, x, out, runs=runs, scale=1.0)
    copied = x.numel() * window**3
    assert seen.elements <= copied // 7, (seen.elements, copied)


def test_bad_rules_and_tensors_are_refused_with_the_numbers() -> None:
    for make, words in (
        (lambda: Near(9, 4), "odd"),
        (lambda: Near(9, 5, 2), "exceeds a dim of 9"),
        (lambda: Blocks(9, 3, 3), "smaller"),
        (lambda: Strided(9, 0), "from 1"),
    ):
        with pytest.raises(KernelError, match=words):
            make()
    q, k, v, _ = draw((4,), heads=3, groups=2)
    with pytest.raises(KernelError, match="3 query heads"):
        attend(q, k, v, [Near(4, 3)])
    with pytest.raises(KernelError, match="2 grid dims"):
        attend(q, k, v, [Near(4, 3)] * 2)
    with pytest.raises(KernelError, match="float dtype"):
        attend(q, q.float(), q, [Near(4, 3)])
