"""The delta rule's Triton kernels far out: offsets past 2^31 elements, grids past 65,535."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_delta import DECAYS
from xdist_kernels import delta
from xdist_kernels.delta import triton_gradient_launches, triton_launches
from xdist_kernels.delta.torch import Inputs
from xdist_kernels.launch import Config

triton = delta.kernels("triton")
FAR = 2**31


def decays(kind: str, *shape: int) -> Tensor | None:
    return {
        "none": None,
        "scalar": -0.1 * torch.rand(shape[:3]),
        "diagonal": -0.1 * torch.rand(shape),
    }[kind]


@pytest.mark.parametrize("kind", DECAYS)
def test_offsets_past_2_to_the_31(kind: str) -> None:
    """Tokens whose last element lies 2^31 elements behind the first: views of pages that are
    never touched give the bits of a plain copy."""
    torch.manual_seed(0)
    n, heads, dim = 20, 1, 16
    stride = FAR // (n - 1) + 1
    views = []
    for width in (dim, dim, dim, 1):
        memory = torch.empty(stride * (n - 1) + heads * width, dtype=torch.float16)
        view = memory.as_strided((1, n, heads, width), (0, stride, width, 1))
        assert (n - 1) * view.stride(1) > FAR
        views.append(view.copy_(torch.rand(1, n, heads, width) * 0.25))
    log_decay = decays(kind, 1, n, heads, dim)
    state = torch.randn(1, heads, dim, dim)
    found = []
    for q, k, v, beta in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
        tile = triton.prepare(q, k, v, beta.squeeze(-1), log_decay, 0.3, chunk=16)
        out, end = triton.run(tile, state)
        grads, before = triton.backward(tile, state, v, end)
        found.append([out, end, before, *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def last_program(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each launch only the last program runs; the numbers of programs."""
    from triton.runtime.interpreter import interpreter_builder

    started: list[int] = []

    def launch(kernel: Any, programs: int, config: Config, *, device: Any, **given: Any) -> None:
        started.append(programs)
        place = type(interpreter_builder).set_grid_idx
        with pytest.MonkeyPatch.context() as inner:

            def last(x: int, y: int, z: int) -> None:
                place(interpreter_builder, x, y, z)
                interpreter_builder.grid_idx = (programs - 1, y, z)

            inner.setattr(interpreter_builder, "set_grid_idx", last)
            kernel[(1,)](**given, num_warps=config.warps, num_stages=config.stages)

    for module in (triton_launches, triton_gradient_launches):
        monkeypatch.setattr(module, "launch", launch)
    return started


@pytest.mark.parametrize("kind", DECAYS)
def test_grids_past_65535(kind: str, last_program: list[int]) -> None:
    """The last of 70,000 rows, which are one row in memory, is that row."""
    torch.manual_seed(1)
    rows, n, dim = 70_000, 5, 16
    q, k, v, dout = (torch.rand(1, n, 1, dim) * 0.25 for _ in range(4))
    beta, log_decay = torch.rand(1, n, 1), decays(kind, 1, n, 1, dim)
    state = torch.randn(1, 1, dim, dim)
    found = []
    for batch in (1, rows):

        def many(x: Tensor | None, batch: int = batch) -> Any:
            return None if x is None else x.expand(batch, *x.shape[1:])

        tile = triton.prepare(*(many(x) for x in (q, k, v, beta, log_decay)), 0.3, chunk=16)
        out, end = triton.run(tile, many(state))
        ready = triton.backward_ahead(tile, many(state), many(dout))
        grads, before = triton.backward(ready, many(state), many(dout), many(state))
        results = [out, end, before, *(g for g in grads if g is not None)]
        found.append([x[-1] for x in results])
    assert min(last_program[len(last_program) // 2 :]) == rows
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_parts_past_2_to_the_31(last_program: list[int]) -> None:
    """What is kept of each chunk may itself be longer than 2^31 elements."""
    torch.manual_seed(2)
    n, dim = 16, 16
    batch = FAR // (n * dim) + 1
    x = torch.rand(1, n, 1, dim, dtype=torch.float16)
    found = []
    for rows in (1, batch):
        given = x.expand(rows, -1, -1, -1)
        inputs = Inputs(given, given, given, given[..., 0], None, 0.3, None)
        wanted = triton_launches.Wanted()
        parts = triton_launches.prepare(inputs, torch.float16, 16, "ieee", wanted)
        found.append(parts.weight[-1].clone())
    assert batch * n * dim > FAR
    assert torch.equal(*found)
