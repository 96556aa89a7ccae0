"""Merging partial softmax results in place, in one pass over them: the Triton form of torch.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdist_kernels.errors import KernelError
from xdist_kernels.launch import Config, launch, why_not
from xdist_kernels.merge.torch import check

# Numbers of `out` a program holds: eight loads of 16 bytes a thread are in flight at 4 warps.
BLOCK_NUMBERS = 4096
LARGEST_ROW = 8192
# The kernel counts inside a program in 32 bits.
LARGEST_INNER_DIM = 1 << 30


@triton.jit(do_not_specialize=["R"])
def merge_kernel(
    p_out: tl.tensor, p_lse: tl.tensor, p_other: tl.tensor, p_other_lse: tl.tensor,
    R: tl.tensor, N: tl.tensor, H: tl.tensor,
    out_b: tl.tensor, out_n: tl.tensor, out_h: tl.tensor,
    lse_b: tl.tensor, lse_n: tl.tensor, lse_h: tl.tensor,
    other_b: tl.tensor, other_n: tl.tensor, other_h: tl.tensor,
    olse_b: tl.tensor, olse_n: tl.tensor, olse_h: tl.tensor,
    E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, OTHER: tl.constexpr,
) -> None:  # fmt: skip
    """R rows of E numbers, the row of coordinates (b, n, h) at b*out_b + n*out_n + h*out_h.

        for each BR rows, coordinates (b, n, h):                      in parallel
            a, c = lse[b,n,h], other_lse[b,n,h]
            lse[b,n,h] = log(exp a + exp c)
            out[b,n,h,:] = out exp(a)/(exp a + exp c) + other exp(c)/(exp a + exp c)

    OTHER: without it the other parts have no values, only their share of probability (sinks).
    A row that gets nothing is neither read nor written.
    """
    r_0 = tl.program_id(0).to(tl.int64) * BR
    o_r = tl.arange(0, BR)  # [BR]
    o_e = tl.arange(0, BE)  # [BE]
    m_r = o_r < R - r_0
    # One 64-bit division a program; a row's coordinates follow from its first row's.
    i_h = (r_0 % H).to(tl.int32) + o_r
    i_n = ((r_0 // H) % N).to(tl.int32) + i_h // H
    i_b = r_0 // H // N + i_n // N
    i_h = (i_h % H).to(tl.int64)
    i_n = (i_n % N).to(tl.int64)

    p_lse += i_b * lse_b + i_n * lse_n + i_h * lse_h
    b_a = tl.load(p_lse, mask=m_r, other=-float("inf"))  # [BR]
    p_other_lse += i_b * olse_b + i_n * olse_n + i_h * olse_h
    b_c = tl.load(p_other_lse, mask=m_r, other=-float("inf")).to(tl.float32)
    # Not "greater": a NaN is not an empty row and has to be seen in the output.
    m_a = b_a != -float("inf")
    m_c = b_c != -float("inf")

    # The larger part's share is 1 / (1 + e), the smaller's e / (1 + e): no lse is rounded first.
    # -inf - (-inf) would be a NaN.
    b_d = tl.where(m_a, b_a, -1e38) - tl.where(m_c, b_c, -1e38)
    b_e = tl.exp(-tl.abs(b_d))
    b_large = 1.0 / (1.0 + b_e)
    b_small = b_e * b_large
    b_wa = tl.where(b_d >= 0, b_large, b_small)
    b_wc = tl.where(b_d >= 0, b_small, b_large)

    m_e = (o_e < E)[None, :]
    p_out += (i_b * out_b + i_n * out_n + i_h * out_h)[:, None] + o_e[None, :]  # [BR, BE]
    b_o = tl.load(p_out, mask=(m_a & m_c)[:, None] & m_e, other=0.0) * b_wa[:, None]
    if OTHER:
        p_other += (i_b * other_b + i_n * other_n + i_h * other_h)[:, None] + o_e[None, :]
        b_o += tl.load(p_other, mask=m_c[:, None] & m_e, other=0.0) * b_wc[:, None]
    # Threads of several warps read a row's lse; all must have it before one of them writes it.
    tl.debug_barrier()
    # Two empty parts are written as well, as zeros.
    m_o = m_r & (m_c | (b_a == -float("inf")))
    tl.store(p_out, b_o, mask=m_o[:, None] & m_e)
    tl.store(p_lse, tl.maximum(b_a, b_c) + tl.log(1.0 + b_e), mask=m_r & m_c)


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds the attention over other keys to (`out`, `lse`), in place; see torch.py.

    out, other_out `[..., E]`, lse, other_lse `[...]`, float32; any strides but that out's numbers
    of a row lie side by side.

    Raises:
        KernelError: shapes or dtypes that do not fit, or strides of more than three dims that
            cannot be walked as three.
    """
    check(out, lse, other_out, other_lse)
    if other_out.stride(-1) != 1:
        other_out = other_out.contiguous()
    _merge(out, lse, other_out, other_lse)


def merge_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Adds one logit per head that takes probability and has no value, in place; see torch.py.

    out `[B,n,H,E]`, lse `[B,n,H]` float32, sinks `[H]`.
    """
    _merge(out, lse, None, sinks.expand_as(lse))


def _merge(out: Tensor, lse: Tensor, other_out: Tensor | None, other_lse: Tensor) -> None:
    size = out.shape[-1]
    _check(out, lse, size)
    sizes, strides = walk(
        out.shape[:-1],
        [
            out.stride()[:-1],
            lse.stride(),
            out.stride()[:-1] if other_out is None else other_out.stride()[:-1],
            other_lse.stride(),
        ],
    )
    width = max(16, triton.next_power_of_2(size))
    rows = max(1, BLOCK_NUMBERS // width)
    names = ("out", "lse", "other", "olse")
    launch(
        merge_kernel,
        triton.cdiv(lse.numel(), rows),
        Config(warps=4, stages=1),
        device=out.device,
        p_out=out,
        p_lse=lse,
        p_other=other_out,
        p_other_lse=other_lse,
        R=lse.numel(),
        N=sizes[1],
        H=sizes[2],
        **{
            f"{name}_{dim}": step
            for name, steps in zip(names, strides, strict=True)
            for dim, step in zip("bnh", steps, strict=True)
        },
        E=size,
        BR=rows,
        BE=width,
        OTHER=other_out is not None,
    )


def _check(out: Tensor, lse: Tensor, size: int) -> None:
    why = why_not(out.device, out.dtype)
    if why is not None:
        raise KernelError(f"Triton cannot merge these partial results\n{why}")
    if out.dtype != torch.float32 or lse.dtype != torch.float32:
        raise KernelError(
            f"partial results merge in float32 here: got {out.dtype} and {lse.dtype}\n"
            "merge them by backend='torch'"
        )
    if size > LARGEST_ROW or (size > 1 and out.stride(-1) != 1):
        raise KernelError(
            f"a row of {size} numbers {out.stride(-1)} apart cannot be merged in place\n"
            f"it holds at most {LARGEST_ROW}, side by side\nmerge it by backend='torch'"
        )


def walk(
    shape: tuple[int, ...], strides: list[tuple[int, ...]]
) -> tuple[list[int], list[list[int]]]:
    """Sizes, and strides of each tensor, of the same elements walked as three dims.

    Dims whose elements lie evenly in every tensor become one, so that a kernel divides less.

    Raises:
        KernelError: more than three are left.
    """
    dims: list[tuple[int, list[int]]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if dims and all(o == size * i for o, i in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    dims += [(1, [0] * len(strides))] * (3 - len(dims))
    if len(dims) > 3 or max(size for size, _ in dims[1:]) > LARGEST_INNER_DIM:
        raise KernelError(
            f"rows of shape {tuple(shape)} and strides {strides} cannot be walked as three dims\n"
            "make them contiguous first"
        )
    return [size for size, _ in dims], [
        list(steps) for steps in zip(*(s for _, s in dims), strict=True)
    ]


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that start every kind of the kernel, on tensors without values, to be recorded."""
    for size in (32, 64, 80, 96, 128, 192, 256, 512):
        yield f"merge {size}", partial(_case, size, heads=8)
    yield "merge, some heads", partial(_case, 128, heads=5)
    yield "merge sinks", partial(_sinks_case, 128, torch.float32)
    yield "merge sinks, bfloat16", partial(_sinks_case, 64, torch.bfloat16)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """Rows of every length; ahead.py compiles what `cases` do not cover."""
    for width in range(4, LARGEST_ROW.bit_length()):
        yield f"merge {1 << width}", partial(_case, 1 << width, heads=8)
    for size in (5, 80):
        yield f"merge {size}", partial(_case, size, heads=8)


def _case(size: int, heads: int) -> None:
    out, other = (torch.empty(2, 96, 8, size, device="meta") for _ in range(2))
    lse, other_lse = (torch.empty(2, 96, 8, device="meta") for _ in range(2))
    merge_(out[:, :, :heads], lse[:, :, :heads], other[:, :, :heads], other_lse[:, :, :heads])


def _sinks_case(size: int, dtype: torch.dtype) -> None:
    out, lse = torch.empty(2, 96, 8, size, device="meta"), torch.empty(2, 96, 8, device="meta")
    merge_sinks_(out, lse, torch.empty(8, dtype=dtype, device="meta"))
