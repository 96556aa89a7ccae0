"""The learning rate of each step, and the update rules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdist.config import Optimizer
from xdist.errors import CheckpointError, ConfigError
from xdist.train.muon import Muon, orthogonal
from xdist.train.optimizer import (
    build_optimizers,
    check_same_names,
    put_state,
    state_specs,
    state_tensors,
    trained,
)
from xdist.train.schedule import learning_rate


def test_warm_up_then_half_a_cosine() -> None:
    settings = Optimizer(learning_rate=2.0, warmup_steps=4, final_ratio=0.1)
    rates = [learning_rate(settings, step, 11) for step in range(11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    # Halfway between the end of the warm-up and the last step.
    assert rates[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[10] == pytest.approx(0.2)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_constant_and_edges() -> None:
    constant = Optimizer(learning_rate=2.0, warmup_steps=1, schedule="constant")
    assert [learning_rate(constant, step, 3) for step in range(3)] == [2.0, 2.0, 2.0]
    alone = Optimizer(learning_rate=2.0, warmup_steps=0)
    assert learning_rate(alone, 0, 1) == 2.0
    long = Optimizer(learning_rate=2.0, warmup_steps=50)
    assert learning_rate(long, 9, 10) == pytest.approx(0.4)


class Small(nn.Module):
    """One parameter of each role."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(5, 3))
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3).clone())
        self.head = nn.Parameter(torch.ones(2, 3))
        self.bias = nn.Parameter(torch.ones(3))

    def parameter_roles(self) -> dict[str, str]:
        """As a model says it."""
        return {"table": "table", "matrix": "hidden", "head": "other", "bias": "other"}


def _step(module: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["rate"]
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer_and_tables_do_not_decay(name: str) -> None:
    module = Small()
    optimizers = build_optimizers(module, Optimizer(name=name, weight_decay=0.3))
    held = [
        (id(p), type(optimizer), group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(held) == 4
    by_name = {n: next(h for h in held if h[0] == id(p)) for n, p in module.named_parameters()}
    assert by_name["table"][2] == by_name["bias"][2] == 0.0
    assert by_name["matrix"][2] == by_name["head"][2] == 0.3
    assert by_name["matrix"][1] is (Muon if name == "muon" else torch.optim.AdamW)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_state_goes_out_and_in_to_the_bit(name: str) -> None:
    settings = Optimizer(name=name, momentum=0.9 if name == "sgd" else 0.0)
    one, other = Small(), Small()
    first, second = build_optimizers(one, settings), build_optimizers(other, settings)
    _step(one, first, 0)
    _step(one, first, 1)
    other.load_state_dict(one.state_dict())
    saved = state_tensors(trained(one), first)
    check_same_names(state_specs(trained(other), second), saved, "optimizer state")
    for key, values in saved.items():
        put_state(trained(other), second, key, values)
    _step(one, first, 2)
    _step(other, second, 2)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    wrong = state_tensors(trained(one), first)
    wrong.pop(sorted(wrong)[0])
    with pytest.raises(CheckpointError, match="1 missing"):
        check_same_names(state_specs(trained(other), second), wrong, "optimizer state")


def test_the_first_update_is_that_of_plain_adamw() -> None:
    module = Small()
    settings = Optimizer(learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    before = module.matrix.detach().double().clone()
    _step(module, build_optimizers(module, settings), 0)
    gradient = module.matrix.grad.double()
    wanted = before * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-6)
    assert torch.allclose(module.matrix.double(), wanted, rtol=0, atol=1e-6)


def test_sgd_keeps_momentum_of_the_gradient_alone() -> None:
    """Two steps by hand: the decay acts on the parameter, not through the momentum."""
    module = Small()
    settings = Optimizer(name="sgd", momentum=0.5, learning_rate=0.01, weight_decay=0.1)
    (optimizer,) = build_optimizers(module, settings)
    wanted, momentum = module.matrix.detach().clone(), torch.zeros_like(module.matrix)
    for seed in range(2):
        _step(module, [optimizer], seed)
        momentum = 0.5 * momentum + module.matrix.grad
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * momentum
    assert torch.allclose(module.matrix, wanted, rtol=0, atol=1e-6)


def test_sgd_without_momentum_keeps_nothing() -> None:
    module = Small()
    optimizers = build_optimizers(module, Optimizer(name="sgd"))
    _step(module, optimizers, 0)
    assert state_tensors(trained(module), optimizers) == {}
    assert not optimizers[0].state


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8)])
def test_muon_directions_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert found.dtype == torch.float64
    assert values.min() > 0.5
    assert values.max() < 1.3
    # The same singular directions: in their basis nothing is off the diagonal.
    inside = left.t() @ found @ right.t()
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-10
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_muon_momentum_is_nesterov() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = Muon([parameter], rate=1.0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 1.0
    gradients = [torch.randn(4, 4, dtype=torch.float64) for _ in range(2)]
    momentum, wanted = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4).double()
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + gradient
        wanted = wanted - orthogonal(gradient + 0.95 * momentum)
    assert torch.allclose(parameter, wanted, rtol=0, atol=1e-12)


def test_muon_needs_a_model_that_names_its_matrices() -> None:
    with pytest.raises(ConfigError, match="parameter_roles"):
        build_optimizers(nn.Linear(3, 3), Optimizer(name="muon"))
