"""`backend=` of cross_entropy: the same loss and gradients, a tile that does not grow, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xdist
from xdist.cost.model import LOSS_COPIES, LOSS_TILE_TOKENS
from xdist.errors import StrategyError
from xdist.memory.answers import counting_answers
from xdist.memory.loss import TiledCrossEntropy, sum_of_ranks
from xdist_kernels import cross_entropy

TILE = 16


def drawn(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(n)
    hidden = torch.randn(2, n, 8, generator=made).to(dtype).requires_grad_()
    head = torch.randn(50, 8, generator=made).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (2, n), generator=made)
    labels[1, n // 3 : n // 2] = -100
    return hidden, head, labels


def wanted(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients by torch in float64."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, head))
    loss = F.cross_entropy((h @ w.t()).flatten(0, 1), labels.flatten())
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdist_kernels.cross_entropy.triton.TILE_TOKENS", TILE)


@pytest.mark.parametrize("backend", ["triton", "reference", "torch"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
def test_backends_equal_torch(
    backend: str, dtype: torch.dtype, limit: float, poisoned: None, small_tiles: None
) -> None:
    hidden, head, labels = drawn(41, dtype)
    loss = xdist.cross_entropy(hidden, head, labels, backend=backend)
    found = torch.autograd.grad(3.0 * loss, (hidden, head))
    value, *wants = wanted(hidden, head, labels)
    assert abs(float(loss.detach() - value)) <= limit * float(value)
    for own, want in zip(found, wants, strict=True):
        assert float((own - 3.0 * want).abs().max()) <= limit * float(3.0 * want.abs().max())


def test_a_norm_and_an_overwritten_input(small_tiles: None) -> None:
    hidden, head, labels = drawn(37, torch.float32)
    norm = torch.linspace(0.5, 2, 8).requires_grad_()
    results = []
    for backend in ("torch", "triton"):
        own = hidden.detach().clone().requires_grad_()
        loss = TiledCrossEntropy.apply(
            own * 1.0, head, norm, labels, -100, 60, sum_of_ranks(None), torch.float32, True,
            backend,
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, (own, head, norm))))
    for one, other in zip(*results, strict=True):
        assert float((one - other).detach().abs().max()) <= 2e-6 * float(one.detach().abs().max())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_float16_gradients_of_a_long_batch_are_kept(backend: str, small_tiles: None) -> None:
    # 1 / valid is below half of float16's smallest number: with the loss scaled, as float16 is
    # trained, the gradient must be there.
    valid, scale = 1 << 26, 2.0**20
    hidden, head, labels = drawn(40, torch.float16)
    _, *wants = wanted(hidden, head, labels)
    loss = xdist.cross_entropy(hidden, head, labels, valid_tokens=valid, backend=backend)
    found = torch.autograd.grad(loss, (hidden, head), torch.tensor(scale))
    factor = int((labels != -100).sum()) / valid * scale
    for own, want in zip(found, wants, strict=True):
        assert float((own / factor - want).abs().max()) <= 4e-3 * float(want.abs().max())


class LargestTensor(TorchDispatchMode):
    """The largest tensor any op made while it was on, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return out


def test_the_tile_does_not_grow_with_the_tokens(small_tiles: None) -> None:
    # 512 logits a token and one channel: a tile is larger than all that has a number per token.
    sizes = []
    for n in (2 * TILE, 10 * TILE + 3):
        hidden = torch.randn(1, n, 1, requires_grad=True)
        head = torch.randn(512, 1, requires_grad=True)
        labels = torch.randint(0, 512, (1, n))
        with LargestTensor() as largest:
            xdist.cross_entropy(hidden, head, labels, backend="triton").backward()
        sizes.append(largest.nbytes)
    # One tile: gradients take the place of its logits, in whose memory the next tile's lie.
    assert sizes == [TILE * 512 * 4] * 2


def test_a_tile_of_triton_takes_what_is_planned() -> None:
    # Gradients take the place of logits, so one copy of a longer tile.
    assert cross_entropy.kernels("triton").TILE_TOKENS == LOSS_COPIES * LOSS_TILE_TOKENS
    for name in ("torch", "reference"):
        assert cross_entropy.kernels(name).TILE_TOKENS == LOSS_TILE_TOKENS


def test_answers_are_counted_alike(small_tiles: None) -> None:
    hidden, head, labels = drawn(41, torch.float32)
    counts = []
    for backend in ("torch", "triton"):
        with counting_answers() as answers:
            xdist.cross_entropy(hidden, head, labels, backend=backend)
        counts.append((int(answers.seen), int(answers.right)))
    assert counts[0] == counts[1]
    assert counts[0][0] == int((labels != -100).sum())


def test_a_forced_backend_that_cannot_serve_raises() -> None:
    hidden, head, labels = drawn(5, torch.float64)
    with pytest.raises(StrategyError, match=r"(?s)cross_entropy .* Triton .*float64"):
        xdist.cross_entropy(hidden, head, labels, backend="triton")
    with pytest.raises(StrategyError, match="cuda9"):
        xdist.cross_entropy(hidden, head, labels, backend="cuda9")


def _grids() -> dict[str, Callable[..., Tensor]]:
    """Functions of q, k and v [1,4,5,2,3]."""

    def conv(q: Tensor, k: Tensor, v: Tensor, **options: str) -> Tensor:
        weight = k[0, :3, :3, 0, :].permute(2, 0, 1)[:, None]  # [3,1,3,3]
        out = xdist.conv_nd(q[..., 0, :], weight, v[0, 0, 0, 0], groups=3, stride=2, **options)
        return out

    return {
        "neighborhood_attention": lambda *x, **o: xdist.neighborhood_attention(*x, window=3, **o),
        "window_attention": lambda *x, **o: xdist.window_attention(*x, window=3, shift=1, **o),
        "grid_attention": lambda *x, **o: xdist.grid_attention(*x, grid=2, **o),
        "conv_nd": conv,
    }


@pytest.mark.parametrize("name", list(_grids()))
def test_functions_on_grids_have_a_reference_and_no_triton(name: str) -> None:
    made = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, 4, 5, 2, 3, generator=made, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    function, results = _grids()[name], []
    for backend in ("torch", "reference", "auto"):
        out = function(q, k, v, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for own, want, auto in zip(results[1], results[0], results[2], strict=True):
        assert float((own - want).detach().abs().max()) <= 1e-12 * float(want.detach().abs().max())
        assert torch.equal(auto, want)
    with pytest.raises(StrategyError, match=rf"(?s){name} .*there is no Triton kernel for it"):
        function(q, k, v, backend="triton")


def test_a_position_bias_by_the_reference() -> None:
    made = torch.Generator().manual_seed(4)
    q = torch.randn(2, 6, 5, 2, 3, generator=made, dtype=torch.float64)
    k = torch.randn(2, 6, 5, 1, 3, generator=made, dtype=torch.float64)
    bias = torch.randn(2, 5, 5, generator=made, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("torch", "reference"):
        out = xdist.neighborhood_attention(
            q, k, k, window=3, dilation=(2, 1), position_bias=bias, backend=backend
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), bias)))
    for own, want in zip(*results, strict=True):
        assert float((own - want).detach().abs().max()) <= 1e-12 * float(want.detach().abs().max())
