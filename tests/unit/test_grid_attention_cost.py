"""Attention on grids as pure integers: halos, dealt sets, and the way along a sharded dim."""

from __future__ import annotations

import pytest
import torch

import xdist
from xdist.cost.axial import Axial, axial_bytes, axial_choice, axial_switch_dim
from xdist.cost.neighborhood import (
    class_layout,
    class_step,
    grid_attention_bytes,
    neighborhood_bytes,
    window_attention_bytes,
)
from xdist.errors import ConfigError, LayoutError, ShapeError, StrategyError


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_every_byte_sent_is_received(parts: int) -> None:
    for backward in (False, True):
        for moved in (
            [
                neighborhood_bytes(
                    23, parts, r, window=5, dilation=3, other=6, itemsize=2, backward=backward
                )
                for r in range(parts)
            ],
            [
                window_attention_bytes(
                    23, parts, r, window=4, shift=1, other=6, itemsize=2, backward=backward
                )
                for r in range(parts)
            ],
        ):
            assert sum(m.sent_bytes for m in moved) == sum(m.received_bytes for m in moved)


def test_a_halo_is_as_wide_for_any_length() -> None:
    """An inner rank receives (window - 1) x dilation positions, with blocks at most 2 (w - 1)."""
    for size in (64, 640, 64000):
        moved = neighborhood_bytes(size, 4, 1, window=7, dilation=2, other=10, itemsize=4)
        assert moved.received_bytes == (7 - 1) * 2 * 10 * 4
        moved = window_attention_bytes(size, 4, 1, window=5, shift=2, other=10, itemsize=4)
        assert moved.received_bytes <= 2 * (5 - 1) * 10 * 4
    assert neighborhood_bytes(640, 4, 1, window=1, other=10, itemsize=4) == (0, 0)


def test_dealt_sets_are_whole_and_half_of_a_layer_moves_twice() -> None:
    for size, grid, parts in ((12, 4, 3), (13, 4, 3), (5, 5, 2), (3, 1, 4), (7, 9, 2)):
        step = class_step(size, grid)
        layout = class_layout(size, step, parts)
        for residue in range(min(step, size)):
            owners = {layout.owners(at, at + 1)[0].rank for at in range(residue, size, step)}
            assert len(owners) == 1
    moved = grid_attention_bytes(16, 4, 1, grid=4, keys=3, outputs=1, itemsize=4)
    assert moved.received_bytes == 16 // 4 * 3 // 4 * (3 + 1) * 4


def call(**other: object) -> Axial:
    settings = {
        "sizes": (8, 8, 8), "dim": 0, "parts": 4, "mask": xdist.Mask(causal=False), "batch": 1,
        "heads": 4, "groups": 4, "head_dim": 8, "value_dim": 8, "element_bytes": 4,
        "switched": (96, 32),
    } | other  # fmt: skip
    return Axial(**settings)


def test_axial_attention_takes_the_fewest_bytes() -> None:
    """Of equals the switch; the ring where few key heads serve many; no switch in one dim."""
    assert axial_choice(call()) == "switch"
    assert axial_choice(call(heads=32, groups=1, switched=(272, 256))) == "ring"
    assert axial_choice(call(sizes=(64,))) == "ulysses"
    elements = 8 * 8 * 8 // 4 * 3 // 4 * (96 + 32)
    assert axial_bytes(call(), "switch", 0) == 2 * 2 * elements * 4
    assert axial_switch_dim((8, 3, 6), 0, 3) == 1
    assert axial_switch_dim((8, 7, 6), 0, 3) == 2


def test_calls_that_do_not_fit_are_refused_with_the_numbers() -> None:
    x = torch.zeros(1, 6, 5, 2, 4)
    for function, options, words in (
        (xdist.neighborhood_attention, {"window": (3, 7)}, r"dim 1 .*\(6, 5\)[\s\S]*exceeds"),
        (xdist.neighborhood_attention, {"window": 3, "dilation": 2}, "dim 1"),
        (xdist.neighborhood_attention, {"window": 4}, "odd"),
        (xdist.neighborhood_attention, {"window": (3, 3, 3)}, "2 dims"),
        (xdist.neighborhood_attention, {"window": 2.5}, "integer"),
        (xdist.window_attention, {"window": 3, "shift": 3}, "smaller"),
        (xdist.grid_attention, {"grid": (2, 0)}, r"\(2, 0\)"),
    ):
        with pytest.raises(ShapeError, match=words):
            function(x, x, x, **options)
    bias = torch.zeros(2, 5, 4)
    with pytest.raises(ShapeError, match=r"\(2, 5, 5\)"):
        xdist.window_attention(x, x, x, window=3, position_bias=bias)
    with pytest.raises(ShapeError, match="2 query heads, 0 key heads"):
        xdist.window_attention(x, x[..., :0, :], x[..., :0, :], window=3)
    with pytest.raises(ShapeError, match="one float dtype"):
        xdist.grid_attention(x, x.double(), x, grid=2)
    with pytest.raises(ShapeError, match="do not fit together"):
        xdist.grid_attention(x, x[:, 1:], x, grid=2)
    with pytest.raises(StrategyError, match="halo"):
        xdist.axial_attention(x, x, x, dim=0, strategy="halo")
    with pytest.raises(StrategyError, match="no other dim"):
        xdist.axial_attention(x[:, 0], x[:, 0], x[:, 0], dim=0, strategy="switch")
    with pytest.raises(LayoutError, match="dim 2"):
        xdist.axial_attention(x, x, x, dim=2)
    with pytest.raises(ConfigError, match="pass dims="):
        xdist.nn.WindowAttention(8, window=3, head_dim=4, position_bias=True)


def test_second_derivatives_are_refused() -> None:
    x = torch.zeros(1, 6, 2, 4, requires_grad=True)
    y = xdist.neighborhood_attention(x, x, x, window=3)
    with pytest.raises(StrategyError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
