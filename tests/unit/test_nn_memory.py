"""Tiles on one rank: equal to the whole, with memory that does not grow with the sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xdist
from xdist.errors import ConfigError, ShapeError
from xdist.memory.tiled import tiled
from xdist.models.hybrid_lm import HybridConfig, build, flops_per_token
from xdist.nn import SquaredReLUMLP, build_mixer


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


def test_tiled_mlp_equals_the_whole_and_holds_one_tile(poisoned: None) -> None:
    torch.manual_seed(0)
    mlp = SquaredReLUMLP(8, 64).double()
    torch.nn.init.normal_(mlp.down)
    x = torch.randn(2, 4096, 8, dtype=torch.float64, requires_grad=True)
    wants = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    with LargestTensor() as largest:
        owns = torch.autograd.grad(tiled(mlp, x, tile_tokens=128).square().sum(),
                                   [x, *mlp.parameters()])  # fmt: skip
    for own, want in zip(owns, wants, strict=True):
        assert (own - want).abs().max() <= 1e-12 * want.abs().max()
    # The hidden layer of all tokens would be 8 x the input; nothing exceeds input and output.
    assert largest.nbytes == x.numel() * 8


def test_tiled_layer_takes_an_empty_share_and_refuses_bad_shapes() -> None:
    mlp = SquaredReLUMLP(4, 8)
    x = torch.zeros(2, 0, 4, requires_grad=True)
    out = tiled(mlp, x)
    out.sum().backward()
    assert out.shape == (2, 0, 4)
    with pytest.raises(ShapeError, match=r"\[B, n, C\]"):
        tiled(mlp, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_entropy_in_tiles_equals_torch(dtype: torch.dtype, poisoned: None) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(2, 5000, 4, dtype=dtype, requires_grad=True)
    head = torch.randn(50, 4, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (2, 5000))
    labels[1, 100:4000] = -100
    wide, wide_head = (t.detach().double().requires_grad_() for t in (hidden, head))
    wanted = F.cross_entropy((wide @ wide_head.t()).flatten(0, 1), labels.flatten())
    wants = torch.autograd.grad(wanted, (wide, wide_head))
    with LargestTensor() as largest:
        loss = xdist.cross_entropy(hidden, head, labels)
        owns = torch.autograd.grad(loss, (hidden, head))
    limit = 1e-12 if dtype == torch.float64 else 5e-6
    assert abs(float(loss.detach() - wanted.detach())) <= limit * 10
    for own, want in zip(owns, wants, strict=True):
        assert (own - want).abs().max() <= limit * want.abs().max()
    # All logits would be 2 x 5000 x 50; a tile's are 2048 x 50.
    assert largest.nbytes <= 2048 * 50 * dtype.itemsize


def test_cross_entropy_says_what_does_not_fit_and_runs_backward_once() -> None:
    hidden, head = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4)
    with pytest.raises(ShapeError, match="labels"):
        xdist.cross_entropy(hidden, head, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match="int64"):
        xdist.cross_entropy(hidden, head, torch.zeros(1, 3))
    loss = xdist.cross_entropy(hidden, head, torch.zeros(1, 3, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_model_memory_per_token_is_one_input_a_block() -> None:
    sizes = {"vocab_size": 64, "dim": 32, "head_dim": 16, "window": 16}
    model = build(HybridConfig(**sizes), tile_tokens=256, seed=0)  # type: ignore[arg-type]
    tokens = torch.randint(0, 64, (1, 8192))
    with LargestTensor() as largest:
        model.loss(tokens, tokens).backward()
    # The largest tensor is one stream [1, n, C] of float32, whatever the layers make inside.
    assert largest.nbytes == 8192 * 32 * 4


def test_registry_and_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match="attention, deltanet, gated_deltanet"):
        build_mixer("mamba9", 32)
    with pytest.raises(ConfigError, match="head_dim"):
        build_mixer("linear", 33)
    with pytest.raises(ConfigError, match="finite window"):
        build(HybridConfig(window=None))
    with pytest.raises(ConfigError, match="precision"):
        build(HybridConfig(dtype="float64"), precision="bfloat16")
    config = HybridConfig(pattern="linear", dim=32)
    # qkv and gate, out, decay, chunks of 32, states, MLP, head.
    parts = 2 * 32 * 128 + 2 * 32 * 32 + 2 * 32 + 2 * 32 * 64 + 4 * 32 * 32 + 4 * 32 * 64
    assert flops_per_token(config) == parts + 2 * 32 * 256


def test_block_called_as_a_module_equals_the_streamed_one() -> None:
    config = HybridConfig(dim=16, head_dim=8, window=5, dtype="float64", pattern="linear,attention")
    model = build(config, tile_tokens=32, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.down.normal_()
    tokens = torch.randint(0, 256, (2, 50))
    x = model.embedding.tokens[tokens]
    for block in model.blocks:
        x = block(x)
    assert torch.allclose(model.hidden(tokens), x, rtol=0, atol=1e-11)
