"""`make gpu-linear`: linear attention, the delta rule and state-space models beside their rivals.

One sequence, 16 heads of 128 (selective_scan and the convolution: 2,048 channels), bfloat16, decays
in float32, through the public functions. TFLOP/s count one forward of the chunked form with chunks
of 64 tokens, and a backward as 2.5 of them; GB/s count each input read and each output written
once: both say how far a call is from the card's ceilings, not what a kernel moved. Where `host` is
the larger number, the device waited for Python.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_clock
import gpu_rivals
import gpu_rows
import gpu_supervisor

KI = 1024
TOKENS = (4 * KI, 16 * KI, 64 * KI, 256 * KI)
HEADINGS = {
    "ceilings": "What this card reaches",
    "beside": "Beside rivals: times of theirs over times of ours",
    "time": "Times",
}
OURS, FLASH = "xdist", "flash attention"
ABOUT = " ".join(__doc__.split("\n\n")[1].split())


def _sizes(small: bool, tokens: int) -> Any:
    import gpu_ops

    if small:
        return gpu_ops.Sizes(tokens, heads=1, key=16, value=16, state=4, channels=8)
    return gpu_ops.Sizes(tokens)


def _ours(op: Any, tokens: int, given: Any) -> dict[str, Any]:
    """Times of the Triton kernels through the public function."""
    import gpu_ops

    shard = gpu_ops.shard_of(tokens, given.device)
    inputs = gpu_ops.leaves(op, _sizes(given.small, tokens), _dtype(given), given.device)
    call = functools.partial(op.call, shard=shard, backend="triton")
    return _timed(op, inputs, call, tokens, given)


def _theirs(op: Any, rival: Any, tokens: int, given: Any) -> dict[str, Any]:
    """Times of a rival, or why it does not serve."""
    import gpu_ops

    function = gpu_rivals.function(rival.path)
    if isinstance(function, str):
        return {"remark": function}
    inputs = gpu_ops.leaves(op, _sizes(given.small, tokens), _dtype(given), given.device)
    inputs = gpu_ops.turned(rival, inputs)
    found = gpu_rivals.tried(
        lambda: _timed(op, inputs, lambda x: rival.call(function, x, None), tokens, given)
    )
    return {"remark": found} if isinstance(found, str) else found


def _dtype(given: Any) -> Any:
    import torch

    # Triton's interpreter multiplies bfloat16 wrongly.
    return torch.float32 if given.small else torch.bfloat16


def _timed(
    op: Any, inputs: dict[str, Any], call: Callable[..., Any], tokens: int, given: Any
) -> dict[str, Any]:
    import gpu_ops
    import torch

    leaves = gpu_ops.required(inputs)
    with torch.no_grad():
        out = call(leaves)
        dout = torch.randn_like(out)
        forward = gpu_clock.measure(lambda: call(leaves), given.device)
    both = gpu_clock.forward_backward(lambda: call(leaves), list(leaves.values()), dout)
    whole = gpu_clock.measure(both, given.device)
    peak = gpu_clock.peak_gib(both, given.device)
    row = {
        "forward (ms)": forward.ms,
        "forward + backward (ms)": whole.ms,
        "quartiles (ms)": f"{whole.low_ms:.4g} to {whole.high_ms:.4g}",
        "host (ms)": whole.host_ms,
    }
    flops = 3.5 * op.flops(_sizes(given.small, tokens)) if op.flops else None
    row["TFLOP/s"] = flops / whole.ms / 1e9 if flops else ""
    row["GB/s"] = gpu_ops.moved_bytes(inputs, out, backward=True) / whole.ms / 1e6
    return {**row, "peak (GiB)": peak}


def _flash(tokens: int, given: Any) -> dict[str, Any]:
    """Causal softmax attention by torch's flash kernel, as many key heads as query heads."""
    import dataclasses

    import gpu_ops

    alone = dataclasses.replace(gpu_ops.ATTENTION, draw=gpu_ops.LINEAR[0].draw)
    return _theirs(alone, gpu_ops.FLASH, tokens, given)


def _named(tokens: int) -> str:
    return f"{tokens // KI} Ki" if tokens % KI == 0 else str(tokens)


def _beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an operation and length that both sides have."""
    both, forward = "forward + backward (ms)", "forward (ms)"
    by_case = {row["case"]: row for row in rows if both in row}
    found = []
    for case, row in by_case.items():
        place, _, method = case.partition("; ")
        own = by_case.get(f"{place}; {OURS}")
        if method == OURS or own is None:
            continue
        found.append(
            {
                "case": place,
                "rival": method,
                "theirs, forward (ms)": row[forward],
                "ours, forward (ms)": own[forward],
                "forward": row[forward] / own[forward],
                "theirs, both (ms)": row[both],
                "ours, both (ms)": own[both],
                "forward + backward": row[both] / own[both],
            }
        )
    return found


def _ahead_of_flash(rows: list[dict[str, Any]]) -> list[str]:
    """How GLA stands to flash attention at each length."""
    both = "forward + backward (ms)"
    by_case = {row["case"]: row[both] for row in rows if both in row}
    told = []
    for case, ms in by_case.items():
        tokens = case.partition(", ")[2].partition("; ")[0]
        if case.startswith(FLASH) and (own := by_case.get(f"GLA, {tokens}; {OURS}")):
            told.append(f"{tokens} {ms / own:.2f}")
    return [f"Flash attention's time over GLA's, forward + backward: {'; '.join(told)}."] * bool(
        told
    )


def _judged(rows: list[dict[str, Any]], families: set[str]) -> list[str]:
    """The geometric mean over linear and delta rule, beside what is aimed at."""
    import gpu_ops

    ratios = {
        row["case"]: row["forward + backward"]
        for row in rows
        if row["rival"] == "fla-core" and row["case"].partition(", ")[0] in families
    }
    if not ratios:
        return ["No ratio to fla-core: it was not measured."]
    low = min(ratios, key=lambda case: ratios[case])
    mean = gpu_ops.geometric_mean(list(ratios.values()))
    return [
        f"fla-core's time over ours, forward + backward: geometric mean {mean:.2f} of "
        f"{len(ratios)} (aim: 1.2), least {ratios[low]:.2f} at {low} (aim: 0.95)."
    ]


def rows(given: gpu_rows.Options) -> int:
    """Measures them; 1 where one failed, else 0."""
    import gpu_ops

    table = gpu_rows.Table(
        "gpu-linear", "Linear attention, delta rule and state-space models on a card",
        "make gpu-linear", given, HEADINGS, notes=[ABOUT],
    )  # fmt: skip
    table.measure(
        "ceilings", "this card", lambda: gpu_clock.ceilings(given.device, small=given.small)
    )
    lengths = (24,) if given.small else TOKENS
    # Ours first: a rival that tunes itself for minutes takes no row from us.
    for tokens in lengths:
        for op in gpu_ops.OPS:
            name = f"{op.name}, {_named(tokens)}; {OURS}"
            table.measure("time", name, functools.partial(_ours, op, tokens, given))
    for tokens in lengths:
        name = f"{FLASH}, {_named(tokens)}; torch"
        table.measure("time", name, functools.partial(_flash, tokens, given), theirs=True)
        for op in gpu_ops.OPS:
            for rival in op.rivals:
                if not gpu_rivals.there(rival.path):
                    continue
                name = f"{op.name}, {_named(tokens)}; {rival.name}"
                make = functools.partial(_theirs, op, rival, tokens, given)
                table.measure("time", name, make, theirs=True)
    ratios = _beside(table.of("time"))
    table.derive("beside", ratios)
    families = {op.name for op in (*gpu_ops.LINEAR, *gpu_ops.DELTA)}
    table.notes = [ABOUT, *_judged(ratios, families), *_ahead_of_flash(table.of("time"))]
    return table.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """0: no row failed, or no card; 1: one did; 2: the command broke off."""
    return gpu_supervisor.command("gpu-linear", __file__, __doc__, argv, rows)


if __name__ == "__main__":
    sys.exit(main())
