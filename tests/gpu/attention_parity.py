"""The attention rows of `make gpu-parity`: errors of every mask, kernel and dtype beside float64.

The reference is the blockwise torch form in float64 on the same device, on the inputs as they were
rounded. Our kernels run as a whole and as a ring would run them: keys in two parts, merged in
place, gradients of each part from the log-sum-exp of all.
"""

from __future__ import annotations

import functools
from typing import Any

import gpu_ops
import gpu_rivals
import torch
from attention_cases import OURS, Case, Inputs, Method, draw, kernels, method, rivals
from torch import Tensor

from xdist_kernels.attention import libraries

GROUP, BESIDE = "attention", "attention beside"
HEADINGS = {
    GROUP: "Attention: errors beside float64",
    BESIDE: "Attention beside rivals on the same inputs: the error of ours over theirs",
}
RING = "triton, as a ring"
NAMES = ("out", "lse", "dq", "dk", "dv")
# What fails the command: an error that more than rounding makes.
ALLOWED = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}


def cases(small: bool) -> list[Case]:
    """Every option of the kernels, at a length that no block divides."""
    if small:
        return [Case("2 documents", 40, documents=2, heads=2, groups=1, dim=16, width=16)]
    n = 1531
    narrow = [Case(f"heads of {dim}", n, dim=dim, width=dim) for dim in (32, 64, 96, 256)]
    return [
        Case("causal", n),
        Case("bidirectional", n, {"causal": False}),
        Case("window of 200", n, {"window": 199}),
        Case("window, two sides", n, {"causal": False, "window": (100, 50)}),
        Case("7 documents", n, documents=7),
        Case("7 documents, window of 200", n, {"window": 199}, documents=7),
        Case("chunks of 256", 1536, {"chunk": 256}),
        Case("prefix of 300", n, {"prefix": 300}),
        Case("soft-cap", n, softcap=15.0),
        Case("sinks, window of 128", n, {"window": 127}, sinks=True),
        Case("zigzag order", 1536, turned=True),
        Case("zigzag order, 7 documents", 1536, documents=7, turned=True),
        Case("heads of 192 and 128", n, groups=16, dim=192, width=128),
        *narrow,
    ]


class Reference:
    """One case and dtype: its inputs, and what float64 makes of them, once."""

    def __init__(self, case: Case, dtype: str, device: str) -> None:
        self.case, self.dtype = case, dtype
        self.x = draw(case, getattr(torch, dtype), device)

    @functools.cached_property
    def found(self) -> dict[str, Tensor]:
        made = kernels("torch", self.case, self.x.to(torch.float64), form="blockwise")
        assert isinstance(made, Method)
        return _run(made)

    def row(self, name: str) -> dict[str, Any]:
        """Errors of one method, or why it does not serve."""
        if name in libraries.LIBRARIES:
            found = gpu_rivals.tried(lambda: self._errors(method(name, self.case, self.x)))
            return {"remark": found} if isinstance(found, str) else found
        made = _ring(self.case, self.x) if name == RING else method(name, self.case, self.x)
        row = self._errors(made)
        if "remark" in row:
            return row
        # Written so that a NaN does not pass.
        good = all(row[column] <= ALLOWED[self.dtype] for column in NAMES)
        return row if good else {**row, "failed": True, "remark": "more than rounding"}

    def _errors(self, made: Method | str) -> dict[str, Any]:
        if isinstance(made, str):
            return {"remark": made}
        found = _run(made)
        errors = {n: gpu_ops.relative(x, self.found[n]) for n, x in found.items()}
        return {**errors, "allowed": ALLOWED[self.dtype]}


def _run(made: Method) -> dict[str, Tensor]:
    out, lse = made.forward()
    assert lse is not None
    # An error of the log-sum-exp moves probabilities as much, wherever it stands.
    return dict(zip(NAMES, (out, lse, *made.backward(out, lse)), strict=True))


def _ring(case: Case, x: Inputs) -> Method | str:
    """Our kernels over keys in two parts, the later ones first."""
    whole = kernels(OURS, case, x)
    if isinstance(whole, str):
        return whole
    from xdist_kernels import attention, merge

    ours = attention.kernels(OURS)
    cut = case.tokens // 3
    parts = [slice(cut, case.tokens), slice(0, cut)]
    call = {"scale": case.dim**-0.5, "spans": x.spans, "softcap": case.softcap}

    def forward() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] | None = None
        for part in parts:
            found = ours.attention_forward(
                x.q, x.k[:, part], x.v[:, part], k_positions=x.at[part], into=found, **call
            )
        assert found is not None
        if x.sinks is not None:
            merge.kernels(OURS).merge_sinks_(*found, x.sinks)
        return found[0].to(x.q.dtype), found[1]

    def backward(out: Tensor, lse: Tensor | None) -> tuple[Tensor, ...]:
        delta = ours.attention_delta(out, x.dout)
        found = [
            ours.attention_backward(
                x.q, x.k[:, part], x.v[:, part], lse, delta, x.dout, k_positions=x.at[part], **call
            )
            for part in parts
        ]
        dq = found[0][0] + found[1][0]
        return dq, *(torch.cat([found[1][i], found[0][i]], dim=1) for i in (1, 2))

    return Method(forward, backward, RING)


def rows(table: Any, given: Any) -> None:
    """Measures them into `table`, and the ratios to rivals."""
    dtypes = ("float16",) if given.small else ("float32", "float16", "bfloat16")
    # Ours first: what fails is known early.
    for names in ((OURS, RING), [n for n in rivals() if n in libraries.LIBRARIES]):
        for case in cases(given.small):
            for dtype in dtypes:
                made = functools.cache(functools.partial(Reference, case, dtype, given.device))
                for name in names:
                    if not _asked(case, dtype, name, given.small):
                        continue
                    make = functools.partial(_row, made, name)
                    theirs = name in libraries.LIBRARIES
                    table.measure(GROUP, f"{case.name}, {dtype}; {name}", make, theirs=theirs)
    table.derive(BESIDE, _beside(table.of(GROUP)))


def _asked(case: Case, dtype: str, name: str, small: bool) -> bool:
    """Rings and float16 at one head dim: each dim is compiled anew, for seconds."""
    usual = small or (case.dim == case.width == 128)
    if name in libraries.LIBRARIES:
        return dtype != "float32" and (usual or dtype != "float16")
    return usual or (name != RING and dtype != "float16")


def _row(made: Any, name: str) -> dict[str, Any]:
    return made().row(name)


def _beside(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over theirs, wherever both have numbers."""
    ours = {
        row["case"].partition("; ")[0]: row for row in found if row["case"].endswith("; triton")
    }
    ratios = []
    for row in found:
        case, _, name = row["case"].partition("; ")
        if name not in libraries.LIBRARIES or "out" not in row or "out" not in ours.get(case, {}):
            continue
        errors = {n: ours[case][n] / row[n] if row[n] else float("nan") for n in NAMES}
        ratios.append({"case": case, "rival": name, **errors})
    return ratios
