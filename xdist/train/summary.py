"""The end of a run: held-out bits beside simpler models, measurement beside plan, the report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from xdist.train.progress import Progress
from xdist.train.record import RUN, Record, read_json, read_metrics, replace
from xdist.train.report import (
    SUMMARY,
    planned_peak,
    planned_sent,
    sent_as_planned,
    write_report,
)


def finish_run(
    record: Record,
    progress: Progress,
    summary: Callable[[], tuple[dict[str, Any], list[str]]],
) -> None:
    """Print the summary and write summary.json and report.html. Rank 0 does it alone."""
    if record.rank != 0:
        return
    figures, lines = summary()
    replace(record.directory / SUMMARY, json.dumps(figures, indent=1) + "\n")
    steps = [line for line in read_metrics(record.directory) if "eval" not in line]
    facts = read_json(record.directory / RUN)
    lines = [*lines, *plan_lines(steps, facts)]
    record.status("finished", steps[-1]["step"] if steps else 0, exit_code=0)
    lines.append(f"report: {write_report(record.directory)}")
    for line in lines:
        progress.say(line)


def plan_lines(steps: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """For each stage: bytes and memory of the busiest rank, planned and measured."""
    found = []
    for stage in sorted({step["stage"] for step in steps}):
        of_stage = [step for step in steps if step["stage"] == stage]
        planned = planned_sent(of_stage)
        sent = max(max(step["sent_bytes"]) for step in of_stage)
        peak = max(max(step["peak_memory_bytes"]) for step in of_stage)
        rate = statistics.median(step["tokens_per_s"] for step in of_stage)
        guess = planned_peak(facts, stage)
        beside_bytes = ""
        if planned is not None:
            beside_bytes = f" (planned {planned:,}, {_same(sent_as_planned(of_stage))})"
        beside_memory = f" (planned {guess / 2**30:.2f})" if guess else ""
        found.append(
            f"length {of_stage[0]['sequence_length']:,}: {sent:,} bytes sent a step and rank"
            f"{beside_bytes}, peak {peak / 2**30:.2f} GiB{beside_memory}, {rate:,.0f} tokens/s"
        )
    return found


def _same(equal: bool) -> str:
    return "equal in every step" if equal else "NOT EQUAL"
