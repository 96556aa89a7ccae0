"""The backend: torch by default; one that is absent raises and says what there is."""

from __future__ import annotations

import pytest

from xdist_kernels import backend
from xdist_kernels.errors import KernelError


def test_torch_is_the_default_and_an_absent_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", None)
    with pytest.raises(KernelError, match=r"'triton' was asked for(.|\n)*it has: torch"):
        backend.force_backend("triton")
    assert backend.backend() == "torch"
    backend.force_backend("torch")


def test_a_backend_in_use_is_not_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", "torch")
    monkeypatch.setattr(backend, "AVAILABLE", ("torch", "other"))
    with pytest.raises(KernelError, match="'torch' was used"):
        backend.force_backend("other")
