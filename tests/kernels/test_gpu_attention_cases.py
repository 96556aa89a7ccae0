"""What `make gpu-attention` and attention's part of `make gpu-parity` measure is what they say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import xdist
from tests.kernels.attention_library_fakes import install
from xdist.cost.attention_keys import head_spans
from xdist.parallel.attention import problem_of
from xdist_kernels.attention import library_masks
from xdist_kernels.attention.blocks import visible


@pytest.fixture
def module() -> Iterator[Callable[[str], Any]]:
    """Imports a file of tests/gpu by its name."""
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
    yield importlib.import_module
    sys.path[:] = before


def test_measured_masks_are_those_of_xdist(module: Callable[[str], Any]) -> None:
    flex_mask, draw = (getattr(module("attention_cases"), n) for n in ("flex_mask", "draw"))
    cases = module("gpu_attention").cases(False) + module("attention_parity").cases(False)
    assert len(cases) > 30
    for long in cases:
        case = replace(long, tokens=512, documents=min(long.documents, 12))
        shard = xdist.SequenceShard(
            xdist.Mesh.one_rank("cpu"),
            xdist.Layout.contiguous(case.tokens, 1),
            case.cuts() if case.documents > 1 else None,
        )
        q, k, v = (torch.empty(1, case.tokens, 1, 8, device="meta") for _ in range(3))
        mask = xdist.Mask(**case.mask)
        problem = problem_of(q, k, v, shard, mask=mask, sinks=None, key_shard="same")
        order = case.order()
        lo, hi, prefix_lo, prefix_hi = head_spans(problem, order.numpy(), 0, 1)[0]
        spans = tuple(torch.from_numpy(s.copy()) for s in (lo, hi, prefix_lo, prefix_hi))
        rows, at = slice(0, case.tokens), torch.arange(case.tokens)
        seen = visible(spans, rows, at)  # type: ignore[arg-type]
        assert torch.equal(visible(case.spans(), rows, at), seen), case.name
        assert case.pairs() == int(seen.sum()), case.name
        narrow = replace(case, heads=1, groups=1, dim=8, width=8)
        sees = flex_mask(case, draw(narrow, torch.float32, "cpu"))
        # Keys lie in the case's order, `seen` has them by their positions.
        found = sees(0, 0, at.unsqueeze(1), at)
        assert torch.equal(found, seen[:, order]), case.name
        assert case.flops() == 2.0 * case.pairs() * case.heads * (case.dim + case.width)


@pytest.mark.slow
def test_libraries_stand_beside_our_kernels(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their rows of errors and times, by stand-ins of the libraries; ours in the interpreter."""
    cases, parity = module("attention_cases"), module("attention_parity")
    timed, rows = module("gpu_attention"), module("gpu_rows")
    install(monkeypatch)
    monkeypatch.setattr(cases.gpu_rivals, "has", lambda distribution: True)
    monkeypatch.setattr(library_masks, "_SHORT", 1)
    tiny = {"heads": 2, "groups": 1, "dim": 16, "width": 16}
    measured = [
        cases.Case("documents", 40, documents=2, **tiny),
        cases.Case("sinks", 24, sinks=True),
    ]
    monkeypatch.setattr(parity, "cases", lambda small: measured[:1])
    given = rows.options("", ["--device", "cpu", "--small", "--out", str(tmp_path)])
    table = rows.Table("gpu-toy", "Toys", "make gpu-toy", given, dict(parity.HEADINGS))
    parity.rows(table, given)
    found = {row["case"].partition("; ")[2]: row for row in table.of(parity.GROUP)}
    assert list(found) == ["triton", "triton, as a ring", "cudnn", "flash_attn", "flash_sdpa"]
    assert found["cudnn"]["remark"] == "its sequences have one length"
    for name in ("triton", "triton, as a ring", "flash_attn", "flash_sdpa"):
        assert all(0 < found[name][column] <= 1e-3 for column in parity.NAMES), name
        assert not found[name].get("failed")
    beside = {row["rival"]: row for row in table.of(parity.BESIDE)}
    assert set(beside) == {"flash_attn", "flash_sdpa"}
    assert all(0.2 < beside["flash_sdpa"][column] < 5 for column in ("out", "dq", "dk", "dv"))

    row = timed.row(measured[0], "flash_sdpa", given)
    assert row["takes"] == "flash_sdpa"
    assert row[timed.BOTH] > 0
    assert timed.row(measured[1], "flash_sdpa", given) == {"remark": "it knows no sinks"}
    assert timed.row(measured[1], "dense", given) == {"remark": "it has no such option"}


def test_ratios_and_aims_are_told(module: Callable[[str], Any]) -> None:
    timed = module("gpu_attention")

    def row(case: str, forward: float, backward: float) -> dict[str, Any]:
        times = {"forward (ms)": forward, "backward (ms)": backward}
        return {"case": case, **times, timed.BOTH: forward + backward}

    rows = timed._beside(
        [
            row("64 documents; triton", 1.0, 2.0),
            row("64 documents; flash_sdpa", 2.0, 2.5),
            row("64 documents; flash_attn", 1.0, 2.0),
            row("64 documents; flex", 4.0, 8.0),
            row("other; flex", 4.0, 8.0),
            {"case": "64 documents; cudnn", "remark": "its sequences have one length"},
        ]
    )
    assert [(r["rival"], r["forward"], r["forward + backward"]) for r in rows] == [
        ("flash_sdpa", 2.0, 1.5),
        ("flash_attn", 1.0, 1.0),
        ("flex", 4.0, 4.0),
    ]
    best, masked = timed._judged(rows)
    assert "64 documents 1.00 (flash_attn)" in best
    assert "64 documents flex 4.00" in masked
    assert timed._judged([])[0].endswith("not measured.")
