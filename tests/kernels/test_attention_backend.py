"""The choice of a backend: by device and refusal, said once; one that cannot serve raises."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from xdist_kernels import backend, conv_nd, neighborhood, prefix
from xdist_kernels.errors import KernelError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_said", set())
    before = backend.set_default("auto")
    yield
    backend.set_default(before)


def none() -> None:
    """A family whose Triton kernels serve everything."""


def too_wide() -> str:
    return "the head dim is 300: use at most 256"


def test_torch_is_the_default_and_an_absent_backend_raises() -> None:
    assert backend.choose("op", "auto", CPU, none) == "torch"
    with pytest.raises(KernelError, match=r"cannot serve(.|\n)*head dim is 300(.|\n)*at most 256"):
        backend.choose("op", "triton", CUDA, too_wide)
    with pytest.raises(KernelError, match=r"no kernel backend 'cuda'(.|\n)*auto, triton, torch"):
        backend.choose("op", "cuda", CPU, none)
    with pytest.raises(KernelError, match="no kernel backend"):
        backend.set_default("cuda")


def test_auto_takes_triton_on_a_gpu_where_it_can_serve() -> None:
    assert backend.choose("op", "auto", CUDA, none) == "triton"
    assert backend.choose("op", "auto", CUDA, too_wide) == "torch"
    assert backend.choose("op", "torch", CUDA, none) == "torch"
    assert backend.choose("op", "reference", CUDA, too_wide) == "reference"


def test_a_choice_is_said_once_for_each_op(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="xdist"):
        for _ in range(3):
            backend.choose("first", "auto", CPU, none)
            backend.choose("second", "auto", CUDA, too_wide)
            backend.choose("first", "reference", CPU, none)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "first runs on torch: the tensors are on cpu"),
        (
            "WARNING",
            "second runs on torch: Triton cannot serve: the head dim is 300: use at most 256",
        ),
        ("INFO", "first runs on reference: as asked"),
    ]


def test_a_warning_is_said_whatever_was_said_before(caplog: pytest.LogCaptureFixture) -> None:
    """Torch on a CPU, then torch on a GPU for two reasons: each reason once."""
    reasons = iter(["the head dim is 300", "no float64", "no float64", "the head dim is 300"])
    with caplog.at_level(logging.INFO, logger="xdist"):
        backend.choose("op", "auto", CPU, none)
        backend.choose("op", "torch", CUDA, none)
        for _ in range(4):
            assert backend.choose("op", "auto", CUDA, lambda: next(reasons)) == "torch"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "op runs on torch: the tensors are on cpu"),
        ("WARNING", "op runs on torch: Triton cannot serve: the head dim is 300"),
        ("WARNING", "op runs on torch: Triton cannot serve: no float64"),
    ]


@pytest.mark.parametrize("family", [prefix, conv_nd, neighborhood])
def test_an_op_without_triton_kernels_does_not_advise_what_was_asked(
    family: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    assert backend.choose("op", "auto", CUDA, family.refusal) == "torch"
    assert caplog.messages == [
        "op runs on torch: Triton cannot serve: there is no Triton kernel for it"
    ]
    with pytest.raises(
        KernelError, match=r"no Triton kernel for it\nuse backend='auto' or 'torch'"
    ):
        backend.choose("op", "triton", CUDA, family.refusal)


def test_what_is_decided_is_said_by_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    choice = backend.decide("op", "auto", CUDA, too_wide)
    assert (choice.name, caplog.messages) == ("torch", [])
    choice.say()
    assert len(caplog.messages) == 1


def test_the_default_of_the_process_is_what_auto_means() -> None:
    assert backend.set_default("reference") == "auto"
    assert backend.choose("op", "auto", CPU, none) == "reference"
    assert backend.choose("op", "torch", CPU, none) == "torch"
    backend.set_default("triton")
    with pytest.raises(KernelError, match="cannot serve"):
        backend.choose("op", "auto", CPU, too_wide)
    assert backend.set_default("auto") == "triton"
