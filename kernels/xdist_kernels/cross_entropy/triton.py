"""Cross entropy of a tile of logits in place, in one or two passes: the Triton form of torch.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from xdist_kernels.cross_entropy.triton_kernels import long_rows_kernel, short_rows_kernel
from xdist_kernels.errors import KernelError
from xdist_kernels.launch import Config, launch, why_not

# Gradients take the place of logits: these many tokens need what 2048 need in torch's form, and
# the head's gradient is added up a quarter as often.
TILE_TOKENS = 8192

# A row of this length fits into the registers of 16 warps, two such programs a multiprocessor.
LONGEST_SHORT_ROW = 16384
# 32 numbers a thread are in flight: a short block's, and a long row's, 8 lanes x 4.
BLOCK_NUMBERS = 4096
NUMBERS_A_WARP = 1024
_LONG = Config(warps=16, stages=1)
_LANES, _UNROLLED = 4096, 4


def empty_tile(tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the logits [tokens, vocab] of a tile, each row at a multiple of 64 elements.

    So rows of any vocabulary are read 16 bytes at a time, by matrix products as well.
    """
    width = triton.cdiv(vocab, 64) * 64
    return torch.empty(tokens, width, dtype=dtype, device=device)[:, :vocab]


def tile_loss(
    logits: Tensor, labels: Tensor, ignore_index: int, weight: float
) -> tuple[Tensor, Tensor]:
    """The sum of the tile's losses, 0-dim and float64, and `weight` x its gradient; see torch.py.

    logits [T, V] float32, float16 or bfloat16: overwritten, the gradient lies there. labels int64
    [T]; a label that is neither in [0, V) nor ignore_index makes its loss and gradient NaN (no
    kernel can raise).

    Raises:
        KernelError: a device or dtype without kernels, or shapes that do not fit.
    """
    _check(logits, labels)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens, vocab = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    arguments = {
        "p_x": logits,
        "p_label": labels,
        "p_loss": losses,
        "V": vocab,
        "stride_x": logits.stride(0),
        "stride_label": labels.stride(0),
        "ignore_index": ignore_index,
        "weight": float(weight),
    }
    if vocab <= LONGEST_SHORT_ROW:
        rows, width, config = short_blocks(vocab)
        programs = triton.cdiv(tokens, rows)
        launch(
            short_rows_kernel, programs, config, device=logits.device,
            **arguments, T=tokens, BT=rows, BV=width,
        )  # fmt: skip
    else:
        even = vocab // 16 * 16
        launch(
            long_rows_kernel, tokens, _LONG, device=logits.device,
            **arguments, even=even, BU=_UNROLLED, BL=_LANES, TAIL=even < vocab,
        )  # fmt: skip
    return losses.sum(dtype=torch.float64), logits


def short_blocks(vocab: int) -> tuple[int, int, Config]:
    """Rows and columns of a block of short rows, and its warps: 32 numbers a thread."""
    width = max(16, triton.next_power_of_2(vocab))
    rows = max(1, BLOCK_NUMBERS // width)
    return rows, width, Config(warps=rows * width // NUMBERS_A_WARP, stages=1)


def _check(logits: Tensor, labels: Tensor) -> None:
    why = why_not(logits.device, logits.dtype)
    if why is not None:
        raise KernelError(f"Triton cannot take the loss of these logits\n{why}")
    fits = logits.dim() == 2 and logits.shape[1] > 0 and labels.shape == logits.shape[:1]
    if not fits or labels.dtype != torch.int64:
        raise KernelError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} {labels.dtype} do not "
            "fit\nlogits are [T, V], labels int64 [T]"
        )


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start every kind of the kernels, on tensors without values, to be recorded."""
    vocabularies = (5, 256, 1000, 4096, 8192, 16384, 32000, 50257, 131072)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for vocab in vocabularies:
            name = f"cross entropy {vocab} {str(dtype).removeprefix('torch.')}"
            yield name, partial(_case, vocab, dtype)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """Blocks of rows of every length; ahead.py compiles what `cases` do not cover."""
    for width in range(4, LONGEST_SHORT_ROW.bit_length()):
        yield f"cross entropy {1 << width} bfloat16", partial(_case, 1 << width, torch.bfloat16)


def _case(vocab: int, dtype: torch.dtype) -> None:
    meta = torch.device("meta")
    labels = torch.empty(96, dtype=torch.int64, device=meta)
    tile_loss(empty_tile(96, vocab, dtype, meta), labels, -100, 0.5)
