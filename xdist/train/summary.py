"""The end of a run: held-out bits beside simpler models, measurement beside plan, the report."""

from __future__ import annotations

import json
import statistics
from typing import Any

from xdist.data import TextStore
from xdist.data.prepare import compression_figures
from xdist.train.evaluate import Evaluation
from xdist.train.progress import Progress
from xdist.train.record import RUN, Record, read_json, read_metrics, replace
from xdist.train.report import SUMMARY, write_report

BYTES = 256


def finish_run(
    record: Record, progress: Progress, store: TextStore, split: str, final: Evaluation
) -> None:
    """Print the summary and write summary.json and report.html. Rank 0 does it alone."""
    if record.rank != 0:
        return
    figures = compare(store, split, final)
    replace(record.directory / SUMMARY, json.dumps(figures, indent=1) + "\n")
    steps = [line for line in read_metrics(record.directory) if "eval" not in line]
    facts = read_json(record.directory / RUN)
    lines = [compression_line(figures), *plan_lines(steps, facts)]
    record.status("finished", steps[-1]["step"] if steps else 0, exit_code=0)
    lines.append(f"report: {write_report(record.directory)}")
    for line in lines:
        progress.say(line)


def compare(store: TextStore, split: str, final: Evaluation) -> dict[str, Any]:
    """The evaluation, and for bytes what order-0 entropy and xz make of the same bytes."""
    figures: dict[str, Any] = final.line()
    if store.vocabulary_size != BYTES or store.split(split).sample_length is not None:
        return figures
    sample = store.split(split).read(0, final.read_tokens)
    known = store.figures if store.figures.get("bytes") == sample.size else None
    simple = known or compression_figures(sample)
    names = ("order0_bits_per_byte", "xz_bits_per_byte")
    return {**figures, **{name: simple[name] for name in names}}


def compression_line(figures: dict[str, Any]) -> str:
    """One line: the model, and the two yardsticks where tokens are bytes."""
    said = f"held out: {figures['bits_per_token']:.3f} bits per "
    if "order0_bits_per_byte" not in figures:
        said += f"token over {figures['tokens']:,} tokens"
        right = figures.get("accuracy")
        return said if right is None else f"{said}, {right:.1%} of the answers right"
    return said + (
        f"byte over {figures['tokens']:,} bytes; the same bytes have order-0 entropy "
        f"{figures['order0_bits_per_byte']:.3f}, xz -9e makes {figures['xz_bits_per_byte']:.3f}"
    )


def plan_lines(steps: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """For each stage: bytes and memory of the busiest rank, planned and measured."""
    found = []
    memory = facts.get("planned_peak_memory_bytes") or []
    for stage in sorted({step["stage"] for step in steps}):
        of_stage = [step for step in steps if step["stage"] == stage]
        planned = of_stage[0]["planned_bytes"]
        sent = max(max(step["sent_bytes"]) for step in of_stage)
        peak = max(max(step["peak_memory_bytes"]) for step in of_stage)
        rate = statistics.median(step["tokens_per_s"] for step in of_stage)
        equal = all(step["sent_bytes"] == step["planned_bytes"] for step in of_stage)
        guess = max(memory[stage]) if stage < len(memory) and memory[stage] else 0
        beside_bytes = f" (planned {max(planned):,}, {_same(equal)})" if planned else ""
        beside_memory = f" (planned {guess / 2**30:.2f})" if guess else ""
        found.append(
            f"length {of_stage[0]['sequence_length']:,}: {sent:,} bytes sent a step and rank"
            f"{beside_bytes}, peak {peak / 2**30:.2f} GiB{beside_memory}, {rate:,.0f} tokens/s"
        )
    return found


def _same(equal: bool) -> str:
    return "equal in every step" if equal else "NOT EQUAL"
