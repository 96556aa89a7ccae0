"""The Triton kernels of a tile's cross entropy equal the token loop, in place, at any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted_grid import only_last_programs
from xdist_kernels.cross_entropy import kernels, reference
from xdist_kernels.cross_entropy.triton import (
    LONGEST_SHORT_ROW,
    TILE_TOKENS,
    empty_tile,
    short_blocks,
    tile_loss,
)
from xdist_kernels.errors import KernelError

IGNORED = -100
# Short rows of one block and several, odd, at the border; long rows with and without a rest of
# less than 16, less and more than one block of lanes.
SIZES = [(1, 3), (5, 300), (50, 40), (257, 17), (1000, 5), (LONGEST_SHORT_ROW, 2),
         (LONGEST_SHORT_ROW + 1, 3), (32000, 3), (50257, 2)]  # fmt: skip


def drawn(vocab: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits where a kernel expects them, and labels, some ignored."""
    made = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(tokens, vocab, generator=made)
    labels = torch.randint(0, vocab, (tokens,), generator=made)
    labels[1::3] = IGNORED
    labels[0], labels[-1] = vocab - 1, 0
    tile = empty_tile(tokens, vocab, dtype, logits.device)
    return tile.copy_(logits), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("vocab", "tokens"), SIZES)
def test_equals_the_token_loop(vocab: int, tokens: int, dtype: torch.dtype, poisoned: None) -> None:
    logits, labels = drawn(vocab, tokens, dtype)
    want, dwant = reference.tile_loss(logits.double(), labels, IGNORED, 0.25)
    found, gradient = tile_loss(logits, labels, IGNORED, 0.25)
    assert gradient.data_ptr() == logits.data_ptr()
    assert gradient.dtype == dtype
    assert abs(float(found - want)) <= 1e-6 * float(want) + 1e-6
    # Sums are float32; a gradient of at most 0.25 is rounded to its dtype once.
    limit = 2e-7 if dtype == torch.float32 else 2.0**-13
    assert float((gradient - dwant).abs().max()) <= limit


def test_the_other_forms_agree() -> None:
    logits, labels = drawn(50, 9, torch.float32)
    given = (labels, IGNORED, 0.5)
    want, dwant = kernels("reference").tile_loss(logits.double(), *given)
    total, gradient = kernels("torch").tile_loss(logits.clone(), *given)
    assert abs(float(total - want)) <= 1e-5
    assert float((gradient - dwant).abs().max()) <= 2e-7
    total, gradient = kernels("torch").tile_loss(logits.half(), *given)
    assert (total.dtype, gradient.dtype) == (torch.float32, torch.float16)
    assert kernels("triton").tile_loss is tile_loss


@pytest.mark.parametrize("vocab", [40, LONGEST_SHORT_ROW + 33])
def test_extreme_logits_make_no_nan(vocab: int) -> None:
    logits, labels = drawn(vocab, 6, torch.float32)
    logits[0] = -torch.inf
    logits[0, labels[0]] = -1e30
    logits[2] += 1e6
    logits[3, ::2] = -torch.inf
    logits[3, labels[3]] = 3.0
    logits[5] = -1e4
    want, dwant = reference.tile_loss(logits.double(), labels, IGNORED, 1.0)
    found, gradient = tile_loss(logits, labels, IGNORED, 1.0)
    assert abs(float(found - want)) <= 1e-6 * abs(float(want)) + 1e-6
    assert float((gradient - dwant).abs().max()) <= 1e-6


@pytest.mark.parametrize("vocab", [40, LONGEST_SHORT_ROW + 33])
def test_ignored_rows_are_not_read_and_wrong_labels_are_seen(vocab: int) -> None:
    logits, labels = drawn(vocab, 5, torch.float32)
    logits[1] = torch.nan
    total, gradient = tile_loss(logits, torch.full_like(labels, IGNORED), IGNORED, 1.0)
    assert float(total) == 0.0
    assert not gradient.any()

    for wrong in (-1, vocab, 1 << 40):
        logits, labels = drawn(vocab, 5, torch.float32)
        dwant = reference.tile_loss(logits.double(), labels, IGNORED, 1.0)[1]
        labels[2] = wrong
        total, gradient = tile_loss(logits, labels, IGNORED, 1.0)
        assert bool(total.isnan())
        assert bool(gradient[2].isnan().all())
        others = [0, 1, 3, 4]
        assert float((gradient[others] - dwant[others]).abs().max()) <= 1e-6


@pytest.mark.parametrize("vocab", [40, LONGEST_SHORT_ROW + 5])
def test_nothing_beside_the_logits_is_touched(vocab: int) -> None:
    logits, labels = drawn(vocab, 4, torch.float32)
    want = reference.tile_loss(logits.double(), labels, IGNORED, 1.0)[1]
    around = torch.full((4, vocab + 7), 11.0)
    inner = around[:, 3:-4].copy_(logits)
    total, gradient = tile_loss(inner, labels.repeat_interleave(2)[::2], IGNORED, 1.0)
    assert float((gradient - want).abs().max()) <= 1e-6
    assert torch.equal(around[:, :3], torch.full((4, 3), 11.0))
    assert torch.equal(around[:, -4:], torch.full((4, 4), 11.0))
    # Columns apart from each other are brought together first.
    turned = logits.t().contiguous().t()
    again, gradient = tile_loss(turned, labels, IGNORED, 1.0)
    assert float(again) == pytest.approx(float(total))
    assert float((gradient - want).abs().max()) <= 1e-6


@pytest.mark.parametrize("vocab", [4096, LONGEST_SHORT_ROW + 5])
def test_programs_past_65535_and_offsets_past_31_bits(
    vocab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = only_last_programs(monkeypatch, "xdist_kernels.cross_entropy.triton")
    # A file of holes: what is not touched takes no memory.
    tokens, step = 65_600, 33_000
    memory = torch.from_file(
        str(tmp_path / "far"), shared=True, size=tokens * step, dtype=torch.float16
    )
    logits, labels = memory.as_strided((tokens, vocab), (step, 1)), torch.tensor([7])
    assert (tokens - 1) * step > 1 << 31
    logits[-1] = drawn(vocab, 1, torch.float16)[0]
    want = reference.tile_loss(logits[-1:].double(), labels, IGNORED, 1.0)[1]
    gradient = tile_loss(logits, labels.expand(tokens), IGNORED, 1.0)[1]
    assert grids == [tokens]
    assert float((gradient[-1] - want[0]).abs().max()) <= 2.0**-11
    assert not gradient[-2].any()


def test_blocks_fit_registers() -> None:
    for vocab in (1, 16, 17, 4096, 4097, LONGEST_SHORT_ROW):
        rows, width, config = short_blocks(vocab)
        assert width >= vocab
        assert rows * width == 32 * 32 * config.warps
        assert config.warps in (4, 8, 16)


def test_rows_of_a_tile_are_aligned() -> None:
    tile = empty_tile(TILE_TOKENS, 50257, torch.bfloat16, torch.device("meta"))
    assert tile.shape == (TILE_TOKENS, 50257)
    assert tile.stride() == (50304, 1)


def test_what_does_not_fit_raises() -> None:
    logits, labels = drawn(8, 4, torch.float32)
    with pytest.raises(KernelError, match="float64"):
        tile_loss(logits.double(), labels, IGNORED, 1.0)
    with pytest.raises(KernelError, match="bfloat16"):
        tile_loss(logits.bfloat16(), labels, IGNORED, 1.0)
    with pytest.raises(KernelError, match="int64"):
        tile_loss(logits, labels.int(), IGNORED, 1.0)
    with pytest.raises(KernelError, match=r"\[T, V\]"):
        tile_loss(logits, labels[:2], IGNORED, 1.0)
