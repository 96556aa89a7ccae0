"""Of the launches a wrapper can make, which ones the compiled ones cover: the rules, and drawn
calls of every family."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xdist_kernels import ahead
from xdist_kernels.ahead_cover import Cover
from xdist_kernels.launch import HOPPER, Config, Launch, launch, recording

ROOT = Path(__file__).resolve().parents[2]
META = torch.device("meta")
CONSTANTS = ("D", "BD", "ROWS", "SOFTCAP", "SINKS", "DECAY", "PRECISION")


def _parameter(name: str) -> Any:
    return SimpleNamespace(
        name=name,
        is_constexpr=name in CONSTANTS,
        annotation_type=None,
        do_not_specialize=False,
        do_not_specialize_on_alignment=False,
    )


class _Kernel:
    """What is read of a kernel that Triton would compile."""

    src = "def attend(p_q, p_sinks, n, D, BD, ROWS):\n    return p_q\n"
    params = tuple(map(_parameter, ("p_q", "p_sinks", "n", *CONSTANTS)))


KERNEL: Any = _Kernel()
vars(KERNEL).update(
    __name__="attend",
    __qualname__="attend",
    __module__="xdist_kernels.attention.triton",
    __globals__={},
)


def _start(
    dim: int, *, dtype: torch.dtype = torch.bfloat16, rows: int = 64, warps: int = 4,
    stages: int = 2, n: int = 5, softcap: bool = False,
    sinks: torch.dtype | None = None, decay: int = 0, precision: str = "ieee",
) -> None:  # fmt: skip
    given = None if sinks is None else torch.empty(8, dtype=sinks, device=META)
    launch(
        KERNEL, 1, Config(warps, stages), device=META,
        p_q=torch.empty(8, dtype=dtype, device=META), p_sinks=given, n=n, D=dim,
        BD=max(16, 1 << (dim - 1).bit_length()), ROWS=rows, SOFTCAP=softcap,
        SINKS=sinks is not None, DECAY=decay, PRECISION=precision,
    )  # fmt: skip


def _launch(dim: int, **changed: Any) -> Launch:
    with recording(HOPPER) as found:
        _start(dim, **changed)
    return found[0]


def _cover(*launches: Launch) -> Cover:
    cover = Cover()
    for one in launches:
        cover.add(one, "row")
    return cover


def test_head_dims_between_compiled_ones_are_covered() -> None:
    cover = _cover(_launch(128), _launch(80), _launch(33))
    for dim in (65, 96, 100, 112, 127, 128, 34, 63, 64):
        assert cover.lacks(_launch(dim)) == [], dim
    assert not cover.lacks(_launch(96, dtype=torch.float16)), "either half"
    assert not cover.lacks(_launch(96, n=1)), "numbers of a call are no constants of ours"
    assert not cover.lacks(_launch(96, precision="tf32x3")), "halves have one precision"


@pytest.mark.parametrize(
    ("dim", "changed", "missing"),
    [
        (256, {}, "attend BD 256"),
        (16, {}, "attend BD 16"),
        (96, {"dtype": torch.float32}, "BD 128 of float"),
        (96, {"decay": 1}, "BD 128 decay 1"),
        (96, {"rows": 32}, "attend tile"),
        (96, {"rows": 128}, "none as large"),
        (96, {"warps": 8}, "attend tile"),
        (96, {"stages": 1}, "attend tile"),
        (96, {"stages": 3}, "none as large"),
        (96, {"sinks": torch.float32}, "SINKS=True"),
        (96, {"softcap": True}, "SOFTCAP=True"),
    ],
)
def test_what_no_compiled_launch_shows_is_named(
    dim: int, changed: dict[str, Any], missing: str
) -> None:
    lacks = _cover(_launch(128), _launch(80)).lacks(_launch(dim, **changed))
    assert any(missing in fact for fact in lacks), lacks


def test_precision_counts_where_float32_is_multiplied() -> None:
    cover = _cover(_launch(128, dtype=torch.float32))
    assert any(
        "tf32x3" in x for x in cover.lacks(_launch(128, dtype=torch.float32, precision="tf32x3"))
    )


def test_options_count_two_at_a_time() -> None:
    some = [_launch(128, softcap=True), _launch(128, sinks=torch.float32), _launch(128)]
    both = _launch(128, softcap=True, sinks=torch.float32)
    assert any("SINKS=True" in x and "SOFTCAP=True" in x for x in _cover(*some).lacks(both))
    assert not _cover(*some, both).lacks(both)
    assert any("p_sinks=half" in x for x in _cover(both).lacks(_launch(128, sinks=torch.float16)))


def test_a_launch_within_larger_ones_is_bound_by_their_rows() -> None:
    cover = Cover()
    for key, dim, stages in (("a", 256, 1), ("b", 128, 2), ("c", 64, 3)):
        cover.add(_launch(dim, stages=stages), key)
    assert cover.bounds(_launch(60, stages=1)) == ["a", "b", "c"]
    assert cover.bounds(_launch(100, stages=2)) == ["b"]
    assert cover.bounds(_launch(100, stages=3)) == []


def test_of_variants_only_what_is_not_covered_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(*dims: int) -> Iterator[tuple[str, Callable[[], object]]]:
        for dim in dims:
            yield f"D{dim}", lambda dim=dim: _start(dim)

    family = SimpleNamespace(cases=lambda: calls(128, 96), variants=lambda: calls(80, 64, 63, 50))
    monkeypatch.setattr(ahead, "families", lambda: {"attention": family})
    planned = [plan.case for plan in ahead.planned("sm_90")]
    assert planned == ["D128", "D96", "D64", "D63"]


@pytest.mark.slow
def test_every_drawn_launch_is_covered_by_compiled_ones() -> None:
    """Calls over all dims, dtypes, options, documents and shared heads that the wrappers accept,
    for both targets; some of their launches are compiled as they are, within what bounds them."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = Path(__file__).with_name("drawn_launches.py")
    result = subprocess.run(
        [sys.executable, script, "7", "25", "1", ROOT / "docs" / "kernels"],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    drawn = [int(line.split()[1]) for line in result.stdout.splitlines() if "drawn" in line]
    assert len(drawn) == 2
    assert min(drawn) > 700, "each call starts a few kernels"
