"""Sizes, windows and bytes of convolutions and patches: integers against torch and brute force."""

from __future__ import annotations

import random

import pytest
import torch

import xdist
from xdist.cost.conv_nd import (
    ConvNdProblem,
    conv_dims,
    conv_nd_bytes,
    even_windows,
    patch_bytes,
    share_windows,
    unpatch_bytes,
)
from xdist.errors import ShapeError


def test_sizes_are_those_of_torch() -> None:
    for n in range(1, 12):
        x = torch.zeros(1, 1, n)
        for taps in range(1, 5):
            for stride in range(1, 4):
                for dilation in (1, 2):
                    options = {"stride": stride, "dilation": dilation}
                    same = xdist.conv_sizes((n,), (taps,), **options)
                    assert same == (-(-n // stride),)
                    for zeros in range(3):
                        if n + 2 * zeros < dilation * (taps - 1) + 1:
                            continue
                        weight = torch.zeros(1, 1, taps)
                        want = torch.conv1d(x, weight, padding=zeros, **options).shape[-1]
                        assert xdist.conv_sizes((n,), (taps,), padding=zeros, **options) == (want,)


def _reads(n: int, taps: int, stride: int, dilation: int, front: int, outputs: range) -> set[int]:
    """Positions that outputs read, tap by tap."""
    at = {o * stride + t * dilation - front for o in outputs for t in range(taps)}
    return {p for p in at if 0 <= p < n}


def test_windows_hold_what_outputs_read_and_end_there() -> None:
    """300 drawn convolutions: every rank's window holds what its outputs read and no more."""
    draw = random.Random(0)
    for _ in range(300):
        n, taps, stride, dilation = (draw.randint(1, m) for m in (20, 5, 3, 3))
        padding = draw.choice(["same", draw.randint(0, 4)])
        try:
            (along,) = conv_dims((n,), (taps,), stride=stride, padding=padding, dilation=dilation)
        except ShapeError:
            assert padding != "same"
            continue
        ranks = draw.randint(1, 4)
        shares = even_windows(along.outputs, ranks)
        for (low, high), share in zip(share_windows(along, ranks), shares, strict=True):
            read = _reads(n, taps, stride, dilation, along.front, range(*share))
            assert read <= set(range(low, high))
            assert 0 <= low <= high <= n
            # Elsewhere the run may also hold positions that no tap reads.
            if read and dilation == 1 and (stride == 1 or padding == "same"):
                assert (low, high) == (min(read), max(read) + 1)


def test_bytes_by_hand() -> None:
    """Three ranks, 9 planes of 4 x 5 positions, batch 2, 3 channels, float32: one plane from each
    neighbour, its gradient back in float32; bfloat16 gradients travel in float32 too."""
    along = conv_dims((9, 4, 5), (3, 3, 3))
    plane = 2 * 3 * 4 * 5
    for size, back in ((4, 4), (2, 4)):
        problem = ConvNdProblem(along, 0, 3, 2, 3, size)
        for rank, planes in ((0, 1), (1, 2), (2, 1)):
            forward = conv_nd_bytes(problem, rank, backward=False)
            assert forward == (planes * plane * size, planes * plane * size)
            backward = conv_nd_bytes(problem, rank, backward=True)
            assert backward == (planes * plane * back, planes * plane * back)
    # 9 positions in patches of 2 on 2 ranks: shares 5 and 4, patches of 6 and 3 positions.
    assert patch_bytes((9, 4), 0, 2, 2, 0, 3, 4) == (0, 1 * 4 * 3 * 4)
    assert unpatch_bytes((9, 4), 0, 2, 2, 0, 3, 4) == (1 * 4 * 3 * 4, 0)


def test_bytes_do_not_depend_on_the_length_along_the_sharded_dim() -> None:
    """The same at any multiple of ranks x stride; at any other length, where shares of outputs and
    inputs cut a little apart, within a bound that knows no length."""
    for stride, dilation, taps in ((1, 1, 3), (1, 4, 5), (2, 1, 3), (3, 2, 4)):
        for dim in range(3):
            found = set()
            for times in (1, 2, 50):
                sizes = [6, 7, 5]
                sizes[dim] = 120 * times
                along = conv_dims(sizes, (taps,) * 3, stride=stride, dilation=dilation)
                problem = ConvNdProblem(along, dim, 4, 1, 2, 4)
                found.add(tuple(conv_nd_bytes(problem, r, backward=True) for r in range(4)))
            assert len(found) == 1
        for length in range(1, 200):
            (along,) = conv_dims((length,), (taps,), stride=stride, dilation=dilation)
            problem = ConvNdProblem((along,), 0, 4, 1, 1, 1)
            received = (conv_nd_bytes(problem, r, backward=False)[1] for r in range(4))
            assert max(received) < along.reach + 4 * stride


def test_settings_that_are_none_are_refused() -> None:
    for options, words in (
        ({"stride": 0}, "stride is an integer of at least 1"),
        ({"dilation": (1, 2, 3)}, "one for each of 2 dims"),
        ({"padding": (1, -1)}, "padding is an integer of at least 0"),
        ({"padding": "full"}, "got 'full'"),
        ({"stride": 1.5}, "stride"),
    ):
        with pytest.raises(ShapeError, match=words):
            xdist.conv_sizes((4, 4), (3, 3), **options)
    with pytest.raises(ShapeError, match=r"dim 1 .*too small"):
        xdist.conv_sizes((4, 2), (3, 3), padding="valid")
    with pytest.raises(ShapeError, match="a size for each dim"):
        xdist.conv_sizes((4, 2), (3,))
