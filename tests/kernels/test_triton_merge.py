"""The Triton kernel of the merge equals the row loop, for any strides, and reads no empty row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted_grid import only_last_programs
from xdist_kernels.errors import KernelError
from xdist_kernels.merge.reference import merge_reference
from xdist_kernels.merge.triton import LARGEST_ROW, merge_, merge_sinks_, walk

Part = tuple[Tensor, Tensor]
SHAPE = (2, 7, 5)


def drawn(size: int, seed: int) -> Part:
    """out [2,7,5,size], lse [2,7,5] float32; every so many rows have no keys."""
    made = torch.Generator().manual_seed(seed)
    out = torch.randn(*SHAPE, size, generator=made)
    lse = torch.randn(*SHAPE, generator=made) * 40
    empty = (torch.arange(lse.numel()) % (seed + 2) == 0).view(SHAPE)
    return out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)


def merged_by_rows(*parts: Part) -> Part:
    """What the float64 loop says."""
    out, lse = merge_reference([(o.flatten(0, -2), s.flatten()) for o, s in parts])
    return out.view(parts[0][0].shape), lse.view(parts[0][1].shape)


def check(found: Part, want: Part) -> None:
    """float32: weights are within a few roundings, lse of size 100 within one."""
    empty = want[1] == -torch.inf
    assert torch.equal(found[1] == -torch.inf, empty)
    assert not found[0][empty].any()
    assert float((found[0] - want[0]).abs().max()) <= 2e-6
    assert float((found[1] - want[1])[~empty].abs().max()) <= 1e-5


def inside(x: Tensor, dim: int) -> Tensor:
    """The same values as a view into a larger tensor of NaN."""
    sizes = list(x.shape)
    sizes[dim] += 3
    view = x.new_full(sizes, torch.nan).narrow(dim, 1, x.shape[dim])
    return view.copy_(x)


def turned(x: Tensor) -> Tensor:
    """The same values with tokens and heads laid out the other way round."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("size", [1, 5, 64, 96, 130])
@pytest.mark.parametrize("laid", ["contiguous", "heads", "tokens", "turned"])
def test_equals_the_row_loop(size: int, laid: str) -> None:
    parts = [drawn(size, seed) for seed in range(3)]
    want = merged_by_rows(*parts)
    out, lse = (x.clone() for x in parts[0])
    if laid in ("heads", "tokens"):
        out, lse = (inside(x, 2 if laid == "heads" else 1) for x in (out, lse))
    for other, other_lse in parts[1:]:
        if laid == "turned":
            other, other_lse = turned(other), turned(other_lse)
        merge_(out, lse, other, other_lse)
    check((out, lse), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinks_equal_the_row_loop(dtype: torch.dtype) -> None:
    part = drawn(40, 1)
    sinks = torch.tensor([0.5, -30.0, 60.0, -torch.inf, 0.0], dtype=dtype)
    want = merged_by_rows(part, (torch.zeros_like(part[0]), sinks.expand(SHAPE)))
    out, lse = (inside(x.clone(), 2) for x in part)
    merge_sinks_(out, lse, sinks)
    # A row without keys has output 0 and the sink's lse; without either it stays empty.
    check((out, lse), want)


def test_rows_without_keys_are_not_read_and_make_no_nan(poisoned: None) -> None:
    lse = torch.tensor([-torch.inf, -torch.inf, 2.0])
    other_lse = torch.tensor([-torch.inf, 1.0, -torch.inf])
    out = torch.empty(3, 20)
    out[2] = 7
    other = torch.empty(3, 20)
    other[1] = 5
    assert bool(out[0].isnan().all())
    merge_(out, lse, other, other_lse)
    assert torch.equal(lse, torch.tensor([-torch.inf, 1.0, 2.0]))
    assert torch.equal(out, torch.tensor([0.0, 5.0, 7.0])[:, None].expand(3, 20))


def test_a_nan_is_seen() -> None:
    out, lse = torch.zeros(2, 4), torch.tensor([torch.nan, 1.0])
    merge_(out, lse, torch.ones(2, 4), torch.tensor([1.0, torch.nan]))
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())


def test_a_large_lse_is_not_rounded_into_the_weights() -> None:
    out, lse = torch.ones(1, 4), torch.tensor([3000.0])
    merge_(out, lse, torch.zeros(1, 4), torch.tensor([3000.0 - 2**-10]))
    # exp(lse - merged) would be off by 1e-4: 3000.69 is rounded to 2^-12.
    assert float((out - torch.tensor(2.0**-10).sigmoid()).abs().max()) <= 1e-7


def test_programs_past_65535_and_offsets_past_31_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = only_last_programs(monkeypatch, "xdist_kernels.merge.triton")
    # A file of holes: what is not touched takes no memory. One head of four is left out, so that
    # all three coordinates count.
    b, n, h, size = 2, 33_000, 3, LARGEST_ROW
    steps = (n * 4 * size + 64, 4 * size, size, 1)
    memory = torch.from_file(str(tmp_path / "far"), shared=True, size=2 * steps[0])
    out, lse = memory.as_strided((b, n, h, size), steps), torch.zeros(b, n, h)
    assert sum((d - 1) * step for d, step in zip(out.shape, steps, strict=True)) > 1 << 31
    out[-1, -1, -1] = 1
    merge_(
        out, lse, torch.full((size,), 3.0).expand(b, n, h, -1), torch.zeros(1, 1, 1).expand(b, n, h)
    )
    assert grids == [b * n * h]
    assert torch.equal(out[-1, -1, -1], torch.full((size,), 2.0))
    assert not out[-1, -1, -2].any()
    assert int(lse.count_nonzero()) == 1
    assert float(lse[-1, -1, -1]) == pytest.approx(0.6931472)


def test_rows_are_walked_in_as_few_dims_as_their_strides_allow() -> None:
    x = torch.empty(3, 1, 4, 5)
    assert walk(x.shape, [x.stride(), x.stride()])[0] == [60, 1, 1]
    some = x[..., 1:3]
    assert walk(some.shape, [some.stride(), some.contiguous().stride()])[0] == [12, 2, 1]
    sinks = torch.empty(5).expand(x.shape)
    assert walk(x.shape, [x.stride(), sinks.stride()]) == ([12, 5, 1], [[5, 1, 0], [0, 1, 0]])
    y = torch.empty(2, 3, 4, 5)
    with pytest.raises(KernelError, match="three dims"):
        walk(y.shape, [y.stride(), (1, 2, 6, 24)])


def test_what_cannot_be_merged_raises() -> None:
    out, lse = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(KernelError, match="float64"):
        merge_(out.double(), lse.double(), out.double(), lse.double())
    with pytest.raises(KernelError, match="float32 or float64"):
        merge_(out.half(), lse, out.half(), lse)
    with pytest.raises(KernelError, match="differ in shape"):
        merge_(out, lse, out[:2], lse[:2])
    with pytest.raises(KernelError, match="side by side"):
        merge_(torch.zeros(2, 3).t(), lse, out, lse)
    with pytest.raises(KernelError, match="float32 here"):
        merge_sinks_(out, lse.double(), torch.zeros(3))


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from xdist_kernels.launch import HOPPER, recording
from xdist_kernels.merge import triton
with recording(HOPPER) as launches:
    for _, call in triton.cases():
        call()
for one in launches:
    places = {name: (i,) for i, (name, _) in enumerate(one.signature)}
    source = ASTSource(
        one.kernel, dict(one.signature), {places[name]: x for name, x in one.constants},
        {places[name]: [["tt.divisibility", 16]] for name in one.aligned},
    )
    options = {"num_warps": one.config.warps, "num_stages": one.config.stages}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    between = ptx[ptx.rindex("ld.global"):ptx.index("st.global")]
    print("bar.sync" in between)
"""


@pytest.mark.slow
def test_no_row_is_written_before_all_threads_have_read_it() -> None:
    """The code for sm_90 has a barrier between the last number read and the first one written:
    several warps read a row's lse, one writes it, and the interpreter runs no warps."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _COMPILE]
    made = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert set(made.stdout.split()) == {"True"}, made.stdout
