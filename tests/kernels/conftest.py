"""Triton's interpreter, made to look for its own functions once a kernel instead of once a call."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from xdist_kernels.launch import interpreted


@pytest.fixture(scope="session", autouse=True)
def _interpreter_patches_once() -> Iterator[None]:
    """While a kernel runs, the interpreter stands in for triton.language, which it searches for
    every function marked @triton.jit that the kernel calls (tl.sum and tl.zeros are such): most of
    a test's time. Here the whole language is replaced at the kernel's start until its end."""
    if not interpreted():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    module: Any = interpreter
    original = module._patch_lang
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    running = False

    def patch(fn: Any) -> Any:
        nonlocal running
        if running:
            return SimpleNamespace(restore=lambda: None)
        scope = original(both)
        running = True

        def restore() -> None:
            nonlocal running
            running = False
            scope.restore()

        return SimpleNamespace(restore=restore)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(module, "_patch_lang", patch)
        yield


@pytest.fixture
def last_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every grid the interpreter runs the last program alone, under its own number."""
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    size, at = builder.set_grid_dim, builder.set_grid_idx

    def only_last(self: Any, *args: Any, **arguments: Any) -> None:
        programs = self.grid[0]

        def move(x: int, y: int, z: int) -> None:
            assert x == 0
            at(programs - 1, y, z)

        with monkeypatch.context() as context:
            context.setattr(builder, "set_grid_dim", lambda *_: size(programs, 1, 1))
            context.setattr(builder, "set_grid_idx", move)
            self.grid = (1,)
            run(self, *args, **arguments)

    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", only_last)
