"""`make gpu-parity`: errors of every operation on a card, beside float64 and beside its rivals.

The reference is the torch form in float64 on the same device, on the inputs as they were rounded;
law 1 (`make gpu`) holds that form to a CPU. An error is |a - b| / |b|, root mean squares, of the
output and of the worst gradient; memory comes filled with NaN. Documents have uneven lengths; one
length is odd. First of all each family of kernels runs again and again on the same inputs, which
gives the same bits, and once under compute-sanitizer's memcheck and racecheck.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_rivals
import gpu_rows
import gpu_supervisor

DTYPES = ("float32", "float16", "bfloat16")
# What fails the command: an error that more than rounding makes.
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
OURS = "xdist"
BITS, SANITIZER, AHEAD = "bits", "sanitizer", "ahead"
# Runs on the same inputs.
TIMES = 20
HEADINGS = {
    AHEAD: "Compiled ahead, side by side",
    SANITIZER: "compute-sanitizer over one short launch of every family",
    BITS: "The same inputs again and again: the same bits",
    "errors": "Errors beside float64",
    "beside": "Beside rivals on the same inputs: the error of ours over theirs",
}
ABOUT = " ".join(__doc__.split("\n\n")[1].split())


def _tokens(small: bool) -> dict[str, tuple[int, list[float]]]:
    """Label -> tokens, and where documents begin as shares of them."""
    if small:
        return {"documents": (41, [0.0, 0.3, 0.31, 1.0])}
    return {"one document": (4096, []), "documents": (3001, [0.0, 0.21, 0.215, 0.6, 1.0])}


def _sizes(small: bool, tokens: int) -> Any:
    import gpu_ops

    if small:
        return gpu_ops.Sizes(tokens, heads=1, key=16, value=16, state=4, channels=8)
    return gpu_ops.Sizes(tokens, heads=4, channels=512)


def _cuts(tokens: int, shares: list[float]) -> list[int] | None:
    return [round(share * tokens) for share in shares] or None


class Case:
    """One operation at one dtype: float64 results once, then the errors of each method."""

    def __init__(self, op: Any, dtype: str, tokens: int, shares: list[float], given: Any) -> None:
        import gpu_ops
        import torch

        self.op, self.dtype, self.device = op, dtype, given.device
        self.cuts = _cuts(tokens, shares)
        self.shard = gpu_ops.shard_of(tokens, given.device, self.cuts)
        sizes = _sizes(given.small, tokens)
        self.inputs = gpu_ops.leaves(op, sizes, getattr(torch, dtype), given.device)

    @functools.cached_property
    def reference(self) -> dict[str, Any]:
        """Output and gradients in float64; also fixes the gradient of the output."""
        wide = {name: x.double() for name, x in self.inputs.items()}
        return self._run(wide, lambda x: self.op.call(x, shard=self.shard, backend="torch"))

    def _run(self, inputs: dict[str, Any], call: Any) -> dict[str, Any]:
        import gpu_ops
        import torch

        leaves = gpu_ops.required(inputs)
        out = call(leaves)
        generator = torch.Generator(device=self.device).manual_seed(1)
        dout = torch.randn(out.shape, generator=generator, device=self.device)
        # The gradient of the output is rounded as the output is, for the reference too.
        dout = dout.to(getattr(torch, self.dtype)).to(out.dtype)
        found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
        gradients = dict(zip((f"d{name}" for name in leaves), found, strict=True))
        return {"out": out.detach(), **{n: x for n, x in gradients.items() if x is not None}}

    def ours(self) -> dict[str, Any]:
        """Errors of the Triton kernels; fails where they are larger than rounding."""
        from xdist.testing import poisoned_empty

        call = functools.partial(self.op.call, shard=self.shard, backend="triton")
        # A hole in an output reads NaN.
        with poisoned_empty():
            found = self._run(self.inputs, call)
        row = self._errors(found)
        # Written so that a NaN does not pass.
        good = row["output"] <= row["allowed"] and row["worst gradient"] <= row["allowed"]
        return row if good else {**row, "failed": True, "remark": "more than rounding"}

    def theirs(self, rival: Any) -> dict[str, Any]:
        """A rival's errors, or why it does not serve."""
        import gpu_ops
        import torch

        function = gpu_rivals.function(rival.path)
        if isinstance(function, str):
            return {"remark": function}
        if self.cuts is not None and not rival.documents:
            return {"remark": "not asked for documents"}
        cuts = None
        if self.cuts is not None:
            cuts = torch.tensor(self.cuts, device=self.device)

        def call(x: dict[str, Any]) -> Any:
            out = rival.call(function, x, cuts)
            return out.transpose(1, 2) if rival.first else out

        def run() -> dict[str, Any]:
            found = self._run(gpu_ops.turned(rival, self.inputs), call)
            return self._errors({"out": found.pop("out"), **gpu_ops.turned(rival, found)})

        row = gpu_rivals.tried(run)
        return {"remark": row} if isinstance(row, str) else row

    def _errors(self, found: dict[str, Any]) -> dict[str, Any]:
        import gpu_ops

        errors = {n: gpu_ops.relative(x, self.reference[n]) for n, x in found.items()}
        output = errors.pop("out")
        # A NaN is the worst there is.
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        return {
            "output": output,
            "worst gradient": errors[worst],
            "of": worst,
            "allowed": ALLOWED[self.dtype],
        }


def _errors_of(case: Any, rival: Any | None) -> dict[str, Any]:
    return case().theirs(rival) if rival else case().ours()


def _beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over theirs, wherever both have numbers."""
    ours = {row["case"].partition("; ")[0]: row for row in rows if row["case"].endswith(OURS)}
    found = []
    for row in rows:
        case, _, method = row["case"].partition("; ")
        if method == OURS or "output" not in row or "output" not in ours.get(case, {}):
            continue
        own = ours[case]
        found.append(
            {
                "case": case,
                "rival": method,
                "output": own["output"] / row["output"] if row["output"] else float("nan"),
                "worst gradient": own["worst gradient"] / row["worst gradient"],
            }
        )
    return found


def _same_bits(table: gpu_rows.Table, given: gpu_rows.Options) -> None:
    import gpu_families

    dtypes = ("float32",) if given.small else ("bfloat16", "float32")
    tokens, times = (17, 2) if given.small else (3001, TIMES)
    if given.device == "cuda":
        # One process compiles one kernel at a time; a machine with a card has many cores.
        make = functools.partial(
            gpu_families.ahead, DTYPES, tokens, given.device, small=given.small,
            processes=min(24, os.cpu_count() or 1), seconds=0.7 * given.row_s,
        )  # fmt: skip
        table.measure(AHEAD, "every family, documents", make)
    for dtype in dtypes:
        found = gpu_families.families(tokens, dtype, given.device, small=given.small)
        # In the interpreter those alone that no row of errors runs.
        wanted = [*found][-3:] if given.small else [*found]
        for name in wanted:
            make = functools.partial(gpu_families.bits, found[name], times)
            table.measure(BITS, f"{name}, {dtype}", make)


def _sanitized(table: gpu_rows.Table, given: gpu_rows.Options) -> None:
    import gpu_sanitizer

    at = gpu_sanitizer.program() if given.device == "cuda" else gpu_sanitizer.NO_CARD
    # The row's own limit, less what its end may take.
    seconds = max(1.0, min(given.row_s, 100.0) - 30.0)
    for tool in gpu_sanitizer.TOOLS:
        make = functools.partial(
            gpu_sanitizer.row, tool, at, given.device, seconds, given.folder, table.name
        )
        table.measure(SANITIZER, tool, make)


def rows(given: gpu_rows.Options) -> int:
    """Measures them; 1 where one failed, else 0."""
    import attention_parity
    import gpu_ops

    table = gpu_rows.Table(
        "gpu-parity", "Errors on a card", "make gpu-parity", given,
        HEADINGS | attention_parity.HEADINGS, notes=[ABOUT],
    )  # fmt: skip
    # In this order: what the tool watches is compiled already.
    _same_bits(table, given)
    _sanitized(table, given)
    attention_parity.rows(table, given)
    dtypes = ("float32",) if given.small else DTYPES
    # Ours first: a rival that tunes itself for minutes takes no row from us.
    for of_rivals in (False, True):
        for label, (tokens, shares) in _tokens(given.small).items():
            for op in gpu_ops.OPS:
                for dtype in dtypes:
                    case = functools.cache(
                        functools.partial(Case, op, dtype, tokens, shares, given)
                    )
                    here = [rival for rival in op.rivals if gpu_rivals.there(rival.path)]
                    for rival in here if of_rivals else [None]:
                        table.measure(
                            "errors",
                            f"{op.name}, {label}, {dtype}; {rival.name if rival else OURS}",
                            functools.partial(_errors_of, case, rival),
                            theirs=rival is not None,
                        )
    table.derive("beside", _beside(table.of("errors")))
    return table.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """0: no row failed, or no card; 1: one did; 2: the command broke off."""
    return gpu_supervisor.command("gpu-parity", __file__, __doc__, argv, rows)


if __name__ == "__main__":
    sys.exit(main())
