"""`make gpu-attention`: attention forward and backward beside cuDNN, flash attention and flex.

One sequence, 16 query heads that share 4 key heads of 128, bfloat16, where a row says nothing else.
`triton` are our kernels as xdist's strategies call them, `xdist` the public function with
backend="auto" (the column `takes` says what it took). TFLOP/s count the products of pairs that see
each other, a backward 2.5 forwards. `host` is how long Python takes to start forward and backward:
where it is the larger number, the device waited for it. Packed documents have drawn lengths. What
sees what is planned once for all calls that see alike; `forward with its plan` counts it in.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_clock
import gpu_rivals
import gpu_rows
import gpu_supervisor

KI = 1024
HEADINGS = {
    "ceilings": "What this card reaches",
    "beside": "Beside rivals: times of theirs over times of our kernels",
    "time": "Times",
    "merge": "Merging partial results, in place",
}
BOTH = "forward + backward (ms)"
ABOUT = " ".join(__doc__.split("\n\n")[1].split())


def cases(small: bool) -> list[Any]:
    """What is measured, the most telling first."""
    from attention_cases import Case

    if small:
        tiny = {"heads": 2, "groups": 1, "dim": 16, "width": 16}
        return [Case("3 documents", 40, documents=3, **tiny)]
    flash = ("flash_attn", "flash_sdpa")
    window = {"window": 1023}
    return [
        *(Case(f"causal, {n} Ki", n * KI) for n in (4, 16, 64)),
        Case("64 documents in 64 Ki", 64 * KI, documents=64, rivals=(*flash, "flex")),
        Case("window of 1,024, 64 Ki", 64 * KI, window, rivals=(*flash, "flex")),
        Case("bidirectional, 16 Ki", 16 * KI, {"causal": False}),
        Case("8,192 documents in 1 Mi", KI * KI, documents=8192, rivals=flash),
        Case("32 documents in 16 Ki", 16 * KI, documents=32, rivals=(*flash, "flex", "dense")),
        Case("causal, 16 key heads, 16 Ki", 16 * KI, groups=16),
        Case("causal, heads of 64, 16 Ki", 16 * KI, heads=32, groups=8, dim=64, width=64),
        Case("causal, heads of 256, 16 Ki", 16 * KI, heads=8, groups=2, dim=256, width=256),
        Case("causal, heads of 192 and 128, 16 Ki", 16 * KI, groups=16, dim=192, width=128),
        Case("chunks of 2,048, 64 Ki", 64 * KI, {"chunk": 2048}),
        Case("prefix of 4,096, 16 Ki", 16 * KI, {"prefix": 4096}, rivals=("flex",)),
        Case("causal, soft-cap, 16 Ki", 16 * KI, softcap=30.0, rivals=(*flash, "flex")),
        Case("window of 128, sinks, 64 Ki", 64 * KI, {"window": 127}, sinks=True, rivals=()),
        Case("causal, zigzag order, 64 Ki", 64 * KI, turned=True),
        Case("window of 1,024, 1 Mi", KI * KI, window, rivals=flash),
    ]


def _dtype(given: Any) -> Any:
    import torch

    # Triton's interpreter multiplies bfloat16 wrongly.
    return torch.float16 if given.small else torch.bfloat16


def row(case: Any, name: str, given: Any) -> dict[str, Any]:
    """Times of one method on one case, or why it does not serve."""
    import attention_cases

    x = attention_cases.draw(case, _dtype(given), given.device)
    if name in (attention_cases.OURS, attention_cases.PUBLIC):
        return _timed(case, attention_cases.method(name, case, x), given)
    found = gpu_rivals.tried(lambda: _timed(case, attention_cases.method(name, case, x), given))
    return {"remark": found} if isinstance(found, str) else found


def _timed(case: Any, method: Any, given: Any) -> dict[str, Any]:
    import torch

    if isinstance(method, str):
        return {"remark": method}
    out, lse = method.forward()
    with torch.no_grad():
        forward = gpu_clock.measure(method.forward, given.device)
    backward = gpu_clock.measure(functools.partial(method.backward, out, lse), given.device)
    # What forward kept would count into the peak below.
    del out, lse

    def both() -> None:
        method.backward(*method.forward())

    whole = gpu_clock.measure(both, given.device)
    anew = gpu_clock.measure(method.anew, given.device).ms if method.anew is not None else ""
    return {
        "forward (ms)": forward.ms,
        "backward (ms)": backward.ms,
        BOTH: whole.ms,
        "quartiles (ms)": f"{whole.low_ms:.3g} to {whole.high_ms:.3g}",
        "host (ms)": whole.host_ms,
        "forward (TFLOP/s)": case.flops() / forward.ms / 1e9,
        "backward (TFLOP/s)": 2.5 * case.flops() / backward.ms / 1e9,
        "forward with its plan (ms)": anew,
        "peak (GiB)": gpu_clock.peak_gib(both, given.device),
        "takes": method.takes,
    }


def _merge(given: Any) -> dict[str, Any]:
    """The merge of a ring's step: two partial results of all heads."""
    import torch

    from xdist_kernels.merge import kernels

    tokens, heads, dim = (8, 1, 16) if given.small else (64 * KI, 16, 128)
    out, other = (torch.randn(1, tokens, heads, dim, device=given.device) for _ in range(2))
    lse, other_lse = (torch.randn(1, tokens, heads, device=given.device) for _ in range(2))
    merge_ = kernels("triton").merge_
    time = gpu_clock.measure(lambda: merge_(out, lse, other, other_lse), given.device)
    moved = 4 * (3 * out.numel() + 3 * lse.numel())
    return {"time (ms)": time.ms, "GB/s": moved / time.ms / 1e6, "host (ms)": time.host_ms}


def _beside(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a case and method that both have times."""
    ours = {row["case"].partition("; ")[0]: row for row in rows if row["case"].endswith("; triton")}
    found = []
    for row in rows:
        place, _, name = row["case"].partition("; ")
        own = ours.get(place, {})
        if name == "triton" or BOTH not in row or BOTH not in own:
            continue
        ratios = {key: row[f"{key} (ms)"] / own[f"{key} (ms)"] for key in ("forward", "backward")}
        found.append(
            {"case": place, "rival": name, **ratios, "forward + backward": row[BOTH] / own[BOTH]}
        )
    return found


def _judged(rows: list[dict[str, Any]]) -> list[str]:
    """What the ratios say about the aims."""
    libraries = ("cudnn", "flash_attn", "flash_sdpa")
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["rival"] in libraries:
            told = row["forward + backward"], row["rival"]
            best[row["case"]] = min(best.get(row["case"], told), told)
    masked = [
        f"{row['case']} {row['rival']} {row['forward + backward']:.2f}"
        for row in rows
        if row["rival"] in ("flex", "dense") and "documents" in row["case"]
    ]
    parts = [f"{case} {ratio:.2f} ({name})" for case, (ratio, name) in best.items()]
    return [
        "The best library's time over our kernels', forward + backward (aim: 0.91): "
        f"{'; '.join(parts) or 'not measured'}.",
        "Flex attention's and a dense mask's over ours for packed documents (aim: 3): "
        f"{'; '.join(masked) or 'not measured'}.",
    ]


def rows(given: gpu_rows.Options) -> int:
    """Measures them; 1 where one failed, else 0."""
    import attention_cases

    table = gpu_rows.Table(
        "gpu-attention", "Attention on a card", "make gpu-attention", given, HEADINGS,
        notes=[ABOUT],
    )  # fmt: skip
    table.measure(
        "ceilings", "this card", lambda: gpu_clock.ceilings(given.device, small=given.small)
    )
    measured = cases(given.small)
    table.measure("merge", "two results of 64 Ki tokens, 16 heads", lambda: _merge(given))
    # Ours and what is compiled already first: flex compiles each mask anew.
    rivals = attention_cases.rivals()
    for names in ((attention_cases.OURS, attention_cases.PUBLIC), rivals):
        for case in measured:
            for name in names:
                if name in rivals and name not in case.rivals:
                    continue
                # The public function takes tokens in their order.
                if name == attention_cases.PUBLIC and case.turned:
                    continue
                make = functools.partial(row, case, name, given)
                table.measure("time", f"{case.name}; {name}", make, theirs=name in rivals)
    ratios = _beside(table.of("time"))
    table.derive("beside", ratios)
    table.notes = [ABOUT, *_judged(ratios)]
    return table.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """0: no row failed, or no card; 1: one did; 2: the command broke off."""
    return gpu_supervisor.command("gpu-attention", __file__, __doc__, argv, rows)


if __name__ == "__main__":
    sys.exit(main())
