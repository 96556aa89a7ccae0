"""`backend=` of the public operations: everywhere, the reference equals torch, and its config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import xdist
from xdist import ops
from xdist.config import load
from xdist.errors import NumericsError, ShapeError, StrategyError
from xdist.nn import block
from xdist.nn.linear import GatedLinearAttention
from xdist.parallel import linear_both_ways, recurrent
from xdist.parallel.backend import chosen
from xdist.testing import relative_error
from xdist.train import loop
from xdist_kernels import backend
from xdist_kernels.linear import triton

B, N, H, D = 1, 9, 2, 3
# They compute nothing that has kernels.
WITHOUT = {"mean", "switch"}
# They have no Triton kernels.
TORCH_ALONE = {
    "conv_nd", "grid_attention", "neighborhood_attention", "prefix_attention", "window_attention",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = backend.default()
    yield
    backend.set_default(before)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def tokens(heads: int = H, dim: int = D) -> Tensor:
    return drawn(B, N, heads, dim)


def decay(*shape: int) -> Tensor:
    return (-torch.rand(shape, dtype=torch.float64)).requires_grad_()


Call = tuple[Callable[..., Any], list[Tensor], dict[str, Any]]


def calls() -> dict[str, Call]:
    """Of each operation: itself, its tensors, and the rest of its arguments."""
    cuts = xdist.SequenceShard(xdist.init_mesh(), xdist.Layout.contiguous(N, 1), [0, 4, 4, N])
    steps, dt = (torch.rand(B, N, size, dtype=torch.float64).requires_grad_() for size in (D, H))
    grid = [drawn(B, 3, 3, H, D) for _ in range(3)]
    labels = torch.tensor([[0, 1, -100, 3, 2, 1, 0, 4, 3]])
    linear_inputs = [tokens(1), tokens(1), tokens()]
    return {
        "attention": (
            xdist.attention, [tokens(), tokens(1), tokens(1)],
            {"shard": cuts, "mask": xdist.Mask(window=4), "softcap": 2.0},
        ),
        "linear_attention": (
            xdist.linear_attention, linear_inputs, {"shard": cuts, "log_decay": decay(B, N, H, D)},
        ),
        "delta_rule": (
            xdist.delta_rule, [*linear_inputs, drawn(B, N, H)],
            {"shard": cuts, "log_decay": decay(H)},
        ),
        "ssd": (
            xdist.ssd, [tokens(), dt, decay(H), tokens(1, 4), tokens(1, 4)],
            {"shard": cuts, "reverse": True, "D": drawn(H)},
        ),
        "selective_scan": (
            xdist.selective_scan,
            [drawn(B, N, D), steps, decay(D, 4), drawn(B, N, 4), drawn(B, N, 4)],
            {"shard": cuts, "D": drawn(D)},
        ),
        "prefix_attention": (
            xdist.prefix_attention, [drawn(H, D), tokens(), tokens()], {"shard": cuts},
        ),
        "causal_conv1d": (
            xdist.causal_conv1d, [drawn(B, N, D), drawn(D, 4), drawn(D)],
            {"shard": cuts, "activation": "silu"},
        ),
        "cross_entropy": (
            xdist.cross_entropy, [drawn(B, N, D), drawn(5, D)], {"labels": labels},
        ),
        "conv_nd": (xdist.conv_nd, [drawn(B, 3, 4, D), drawn(D, D, 3, 3)], {}),
        "neighborhood_attention": (xdist.neighborhood_attention, grid, {"window": 3}),
        "window_attention": (xdist.window_attention, grid, {"window": 2, "shift": 1}),
        "grid_attention": (xdist.grid_attention, grid, {"grid": 2}),
        "axial_attention": (xdist.axial_attention, grid, {"dim": 1}),
        "grid_scan": (_scan_of_a_grid, grid, {}),
        "bidirectional": (_both_ways, linear_inputs, {}),
    }  # fmt: skip


def _scan_of_a_grid(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return xdist.grid_scan(
        xdist.linear_attention, {"q": q, "k": k, "v": v}, order=(1, 0), **options
    )


def _both_ways(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    first, second = xdist.bidirectional(xdist.linear_attention, {"q": q, "k": k, "v": v}, **options)
    return first * second


def test_every_operation_takes_a_backend() -> None:
    names = set(ops.__all__) - WITHOUT
    for name in names:
        parameter = inspect.signature(getattr(xdist, name)).parameters.get("backend")
        assert parameter is not None, name
        assert parameter.default == "auto", name
    assert names == {*calls(), "recurrence"}


def test_the_reference_backend_equals_torch() -> None:
    """Outputs and the gradients of all float inputs, decays among them, in float64."""
    torch.manual_seed(0)
    for name, (op, tensors, rest) in calls().items():
        given = [x for x in (*tensors, *rest.values()) if isinstance(x, Tensor)]
        leaves = [x for x in given if x.is_floating_point()]
        results = []
        for kernels in ("reference", "torch"):
            out = op(*tensors, **rest, backend=kernels)
            # A new graph for each: the loss of cross_entropy is used once.
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for found, want in zip(*results, strict=True):
            assert relative_error(found, want) < 1e-10, name


def test_a_forced_backend_that_cannot_serve_raises() -> None:
    """float64 has no Triton kernels, and some operations have none at all; nor is there a name
    that is not in the list."""
    for name, (op, tensors, rest) in calls().items():
        with pytest.raises(StrategyError, match="cannot serve") as error:
            op(*tensors, **rest, backend="triton")
        none = "there is no Triton kernel" in error.value.why
        assert none == (name in TORCH_ALONE), (name, error.value.why)
        assert error.value.do, name
        with pytest.raises(StrategyError, match=r"no kernel backend 'gpu'(.|\n)*auto, triton"):
            op(*tensors, **rest, backend="gpu")


def test_precision_is_of_the_triton_kernels_of_the_delta_rule() -> None:
    """Its effect is tested beside the kernels; where it would have none it is refused."""
    q = tokens().float()
    given = (q, 0.1 * q, q, torch.rand(B, N, H))
    full = xdist.delta_rule(*given, backend="triton")
    parts = xdist.delta_rule(*given, backend="triton", precision="tf32x3")
    assert relative_error(parts, full) < 2e-6
    with pytest.raises(StrategyError, match=r"'tf32x3' here(.|\n)*runs on torch"):
        xdist.delta_rule(*given, precision="tf32x3")
    with pytest.raises(StrategyError, match="no precision 'tf32'"):
        xdist.delta_rule(*given, precision="tf32")


@pytest.mark.parametrize("cuts", [None, (0, 3, 3, 4, N)])
def test_both_directions_are_summed_in_one_pass(
    cuts: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Triton kernels as by two calls in float64, whose outputs are added."""
    torch.manual_seed(0)
    shard = xdist.SequenceShard(xdist.init_mesh(), xdist.Layout.contiguous(N, 1), cuts)
    given = {"q": tokens(1), "k": tokens(1), "v": tokens(), "log_decay": decay(H).requires_grad_()}

    def outputs(values: dict[str, Tensor], **options: Any) -> list[Tensor]:
        out = xdist.bidirectional(xdist.linear_attention, values, None, shard, **options)
        added = out if isinstance(out, Tensor) else out[0] + out[1]
        return [added, *torch.autograd.grad(added.square().sum(), list(values.values()))]

    narrow = {name: x.detach().float().requires_grad_() for name, x in given.items()}
    want = outputs(given)
    for found, exact in zip(outputs(given, merge=True), want, strict=True):
        assert relative_error(found, exact) < 1e-12
    monkeypatch.setattr(recurrent, "run_together", None)
    for found, exact in zip(outputs(narrow, merge=True, backend="triton"), want, strict=True):
        assert relative_error(found, exact) < 2e-6


def test_the_sum_of_both_directions_is_checked_as_the_two_calls_are() -> None:
    narrow = {"q": torch.ones(1, N, H, D), "k": torch.ones(1, N, H, D), "v": torch.ones(1, N, H, D)}
    growing = narrow | {"log_decay": torch.full((1, N, H), 0.5)}

    def added(given: dict[str, Tensor], **options: Any) -> Any:
        return xdist.bidirectional(
            xdist.linear_attention, given, merge=True, backend="triton", **options
        )

    with xdist.checks(), pytest.raises(NumericsError, match="log_decay at most 0"):
        added(growing)
    with pytest.raises(StrategyError, match="no strategy 'nonsense'"):
        added(narrow, strategy="nonsense")
    with pytest.raises(StrategyError, match="no scan algorithm 'nonsense'"):
        added(narrow, algorithm="nonsense")
    with pytest.raises(StrategyError, match="is one of strategy scan"):
        added(narrow, strategy="switch", algorithm="chain")


def test_more_tokens_than_a_tile_are_summed_by_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of the sum in one pass all exist at once."""
    made = []
    run_merged = linear_both_ways.run_merged

    def counted(*inputs: Any, **options: Any) -> Any:
        made.append(1)
        return run_merged(*inputs, **options)

    monkeypatch.setattr(linear_both_ways, "run_merged", counted)
    torch.manual_seed(0)
    given = {name: torch.randn(B, N, H, D) for name in "qkv"}
    outs = []
    for tile in (N, N - 1):
        monkeypatch.setattr(triton, "TILE_TOKENS", tile)
        outs.append(
            xdist.bidirectional(xdist.linear_attention, given, merge=True, backend="triton")
        )
    assert made == [1]
    assert relative_error(*outs) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("order", [(1, 0), (1,)], ids=["sequence", "rows"])
def test_a_grid_is_scanned_by_triton(order: tuple[int, ...]) -> None:
    """Both directions, whose gradients are added, as by torch in float64."""
    torch.manual_seed(0)
    given = [drawn(B, 3, 4, H, D) for _ in range(3)]

    def outputs(tensors: list[Tensor], kernels: str) -> list[Tensor]:
        inputs = dict(zip("qkv", tensors, strict=True))
        first, second = xdist.grid_scan(
            xdist.linear_attention, inputs, order=order, reverse="both", backend=kernels
        )
        return [first, second, *torch.autograd.grad((first * second).sum(), tensors)]

    narrow = [x.detach().float().requires_grad_() for x in given]
    for found, want in zip(outputs(narrow, "triton"), outputs(given, "torch"), strict=True):
        assert relative_error(found, want) < 2e-6


def test_states_have_no_sum() -> None:
    given = {"q": tokens(), "k": tokens(), "v": tokens(), "output_final_state": True}
    with pytest.raises(ShapeError, match="adds outputs"):
        xdist.bidirectional(xdist.linear_attention, given, merge=True)


def test_auto_is_torch_on_a_cpu_and_what_the_process_says() -> None:
    q = tokens().detach().float()
    same = functools.partial(xdist.linear_attention, q, q, q)
    assert torch.equal(same(), same(backend="torch"))
    assert not torch.equal(same(), same(backend="reference"))
    backend.set_default("reference")
    assert torch.equal(same(), same(backend="reference"))


@pytest.mark.parametrize("name", ["gla", "attention"])
def test_layers_take_what_the_process_says(name: str) -> None:
    """On Triton kernels as by torch in float64."""
    torch.manual_seed(0)
    mixer = xdist.nn.build_mixer(name, 16, head_dim=8)
    x = torch.randn(B, N, 16)

    def outputs(kernels: str, dtype: torch.dtype) -> list[Tensor]:
        backend.set_default(kernels)
        own = mixer.to(dtype)
        y = own(x.to(dtype), None)
        return [y, *torch.autograd.grad(y.square().sum(), list(own.parameters()))]

    found = [one.clone() for one in outputs("triton", torch.float32)]
    for one, want in zip(found, outputs("torch", torch.float64), strict=True):
        assert relative_error(one, want) < 5e-6


class OwnRecurrence(xdist.Recurrence):
    """A sum."""

    transition = "none"

    def state_shape(self, inputs: Any) -> tuple[int, int, int, int]:
        return B, H, 1, D

    def transition_of(self, tile: Any) -> None:
        return None

    def run(self, tile: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        sums = tile[0].cumsum(1) + state.transpose(1, 2)
        return sums, sums[:, -1:].transpose(1, 2)


def test_a_recurrence_of_ones_own_has_no_backends() -> None:
    x = tokens()
    assert relative_error(xdist.recurrence(OwnRecurrence(), x), x.cumsum(1)) < 1e-12
    for call in (
        lambda: xdist.recurrence(OwnRecurrence(), x, backend="torch"),
        lambda: xdist.bidirectional(OwnRecurrence(), [x], backend="torch"),
        lambda: xdist.grid_scan(OwnRecurrence(), [x], order=(0,), backend="torch"),
    ):
        with pytest.raises(StrategyError, match="a recurrence of your own"):
            call()


# --- the config -----------------------------------------------------------------------------------

CONFIG = """
[run]
kernels = "{kernels}"
[model]
kind = "{kind}"
dim = 32
head_dim = 32
pattern = "{pattern}"
"""


def config(path: Path, kernels: str, kind: str, pattern: str) -> Any:
    file = path / "config.toml"
    file.write_text(CONFIG.format(kernels=kernels, kind=kind, pattern=pattern))
    return load(file)


def test_run_kernels_is_what_auto_means_while_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def no_mesh(**settings: Any) -> Any:
        seen.append(backend.default())
        raise StrategyError("no further")

    monkeypatch.setattr(loop, "init_mesh", no_mesh)
    monkeypatch.chdir(tmp_path)
    for kernels in ("auto", "reference"):
        with pytest.raises(StrategyError, match="no further"):
            loop.run(config(tmp_path, kernels, "mixer_lm", "gla*1,mlp*1"))
    assert seen == ["auto", "reference"]
    assert backend.default() == "auto"
    backend.set_default("reference")
    for kernels in ("auto", "torch"):
        with pytest.raises(StrategyError, match="no further"):
            loop.run(config(tmp_path, kernels, "mixer_lm", "gla*1,mlp*1"))
    assert seen[2:] == ["reference", "torch"], "auto leaves alone what the process says"
    assert backend.default() == "reference"


def test_a_run_that_cannot_begin_leaves_no_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_record(*where: Any) -> Any:
        raise PermissionError("no folder")

    monkeypatch.setattr(loop, "Record", no_record)
    with pytest.raises(PermissionError):
        loop.run(config(tmp_path, "reference", "mixer_lm", "gla*1,mlp*1"))
    assert backend.default() == "auto"


def test_a_streamed_block_says_that_torch_computes_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_said", set())
    made = block.Block(GatedLinearAttention(8, head_dim=4), 8, 16)

    def on_a_gpu(op: str, asked: str, like: Any, refusal: Any) -> str:
        return chosen(op, asked, cast("Any", SimpleNamespace(device=torch.device("cuda"))), refusal)

    made.begin(torch.float32)
    monkeypatch.setattr(block, "chosen", on_a_gpu)
    for _ in range(2):
        made.begin(torch.float32)
    assert caplog.messages == [
        "a streamed block runs on torch: Triton cannot serve: its passes over tiles are made of "
        "torch operations"
    ]
    for name in ("triton", "reference"):
        backend.set_default(name)
        with pytest.raises(StrategyError, match=r"a streamed block(.|\n)*made of torch operations"):
            made.begin(torch.float32)
    backend.set_default("torch")
    made.begin(torch.float32)


def test_a_model_with_passes_of_its_own_refuses_other_kernels(tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match=r"run\.kernels = .triton.(.|\n)*hybrid_lm"):
        config(tmp_path, "triton", "hybrid_lm", "linear*1")
    assert config(tmp_path, "torch", "hybrid_lm", "linear*1").run.kernels == "torch"
