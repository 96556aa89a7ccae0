"""report.html of a run: one self-contained page made from the files of its folder alone."""

from __future__ import annotations

import itertools
import math
import pathlib
import string
from html import escape
from typing import Any

from xdist.train.charts import COLOURS, Band, Line, bar_chart, layout_chart, line_chart
from xdist.train.progress import duration
from xdist.train.record import (
    CONFIG,
    REPORT,
    RUN,
    STATUS,
    read_json,
    read_metrics,
    read_status,
    replace,
)

SUMMARY = "summary.json"
Values = dict[str, Any]


def write_report(directory: pathlib.Path) -> pathlib.Path:
    """Make report.html of the run in `directory`, finished or not; return its path.

    Reads metrics.jsonl, status.json, run.json, summary.json and config.toml; what is not there yet
    is left out of the page. Raises FileNotFoundError when the folder holds no run.
    """
    if not (directory / STATUS).exists():
        raise FileNotFoundError(f"{directory} holds no {STATUS}: not the folder of a run")
    path = directory / REPORT
    replace(path, render(directory))
    return path


def render(directory: pathlib.Path) -> str:
    """The page as text."""
    lines = read_metrics(directory)
    steps = [line for line in lines if "eval" not in line]
    evaluations = [line for line in lines if "eval" in line]
    status, facts = read_status(directory), read_json(directory / RUN)
    summary = read_json(directory / SUMMARY)
    config = directory / CONFIG
    sections = [
        _section(
            "Compression",
            "bits per byte of the same held-out bytes; lower is better",
            _compression(summary),
        ),
        _section(
            "Loss",
            f"{_measure(facts)} over the tokens trained on; bands are the stages of the "
            "curriculum with their sequence length",
            _loss(steps, evaluations, _measure(facts)),
        ),
        _section(
            "Dice", "overlap of each class with the truth, on held-out positions", _dice(summary)
        ),
        _section("Throughput", "tokens per second of all ranks together", _throughput(steps)),
        _section("Memory", "peak of each step on each rank, GiB", _memory(steps, facts)),
        _section(
            "Layout", "which rank holds which positions of one sequence, by stage", _layout(facts)
        ),
        _section(
            "Plan and measurement",
            "one optimizer step on the busiest rank; bytes must be equal, memory is an estimate",
            _plan(steps, facts),
        ),
        _details("Configuration", escape(config.read_text()) if config.exists() else ""),
        _details("Versions", _pairs(facts.get("versions", {}))),
    ]
    template = string.Template((pathlib.Path(__file__).parent / REPORT).read_text())
    name = directory.name
    return template.substitute(
        title=escape(f"{name} - xdist"),
        name=escape(name),
        state=escape(str(status.get("state", "unknown"))),
        subtitle=escape(_subtitle(facts, steps)),
        reason=_reason(status),
        tiles="".join(_tiles(steps, summary, facts)),
        sections="\n".join(section for section in sections if section),
        colours=_colours(),
    )


def _subtitle(facts: Values, steps: list[Values]) -> str:
    degrees = facts.get("degrees", {})
    said = ", ".join(f"{name} {value}" for name, value in degrees.items() if value > 1)
    ranks = facts.get("ranks", 1)
    parts = [f"{ranks} rank{'s' * (ranks != 1)}" + (f" ({said})" if said else "")]
    parts.append(f"{len(steps):,} steps, {_tokens(steps)[-1] if steps else 0:,.0f} tokens")
    parts.append(str(facts.get("device", "")))
    return " · ".join(part for part in parts if part)


def _tiles(steps: list[Values], summary: Values, facts: Values) -> list[str]:
    tiles = []
    if "bits_per_token" in summary:
        unit = _measure(facts) if "dice" in summary else _unit(summary)
        tiles.append(_tile(f"{summary['bits_per_token']:.3f}", f"held-out {unit}"))
    if steps:
        losses = [step["loss"] for step in steps if step["loss"] is not None]
        if losses:
            unit = ", nats" if _measure(facts).startswith("bits") else ""
            tiles.append(_tile(f"{losses[-1]:.3f}", f"last training loss{unit}"))
        last = steps[-1]
        longest = max(step["sequence_length"] for step in steps)
        tiles.append(_tile(f"{longest:,}", "longest sequence, tokens"))
        tiles.append(_tile(f"{last['tokens_per_s']:,.0f}", "tokens/s, last step"))
        peak = max(max(step["peak_memory_bytes"]) for step in steps)
        tiles.append(_tile(f"{peak / 2**30:.2f} GiB", "peak memory of a rank"))
        tiles.append(_tile(duration(sum(step["step_s"] for step in steps)), "in steps"))
    if "parameters" in facts:
        tiles.append(_tile(f"{facts['parameters']:,}", "parameters"))
    return tiles


def _compression(summary: Values) -> str:
    if "order0_bits_per_byte" not in summary:
        return ""
    bars = [
        ("order-0 entropy", summary["order0_bits_per_byte"], False),
        ("this model", summary["bits_per_token"], True),
        ("xz -9e", summary["xz_bits_per_byte"], False),
    ]
    return bar_chart(bars, label="held-out bits per byte beside order-0 entropy and xz")


def _measure(facts: Values) -> str:
    """What the loss is: bits per something, or an error."""
    return str(facts.get("measure", "bits/token")).replace("/", " per ")


def _dice(summary: Values) -> str:
    found = summary.get("dice")
    if not found:
        return ""
    bars = [(name, share, True) for name, share in found.items() if share is not None]
    return bar_chart(bars, label="Dice of each class on held-out positions")


def _loss(steps: list[Values], evaluations: list[Values], measure: str) -> str:
    def shown(loss: float | None) -> float:
        return _bits(loss) if measure.startswith("bits") else _plain(loss)

    seen = dict(zip([step["step"] for step in steps], _tokens(steps), strict=True))
    lines = [Line("training", [(seen[s["step"]], shown(s["loss"])) for s in steps], 0)]
    held = [(seen[e["step"]], shown(e["eval"]["loss"])) for e in evaluations if e["step"] in seen]
    if held:
        lines.append(Line("held out", held, 1, dots=True))
    return line_chart(
        lines, _bands(steps), label="loss over training tokens", x_label="tokens trained on"
    )


def _throughput(steps: list[Values]) -> str:
    points = list(zip(_tokens(steps), [s["tokens_per_s"] for s in steps], strict=True))
    return line_chart(
        [Line("tokens/s", points, 2)],
        _bands(steps),
        label="throughput over training tokens",
        x_label="tokens trained on",
        zero=True,
    )


def _memory(steps: list[Values], facts: Values) -> str:
    if not steps:
        return ""
    seen = _tokens(steps)
    lines = [
        Line(
            f"rank {rank}",
            [(x, s["peak_memory_bytes"][rank] / 2**30) for x, s in zip(seen, steps, strict=True)],
            rank,
        )
        for rank in range(min(len(s["peak_memory_bytes"]) for s in steps))
    ]
    planned = [planned_peak(facts, step["stage"]) for step in steps]
    if any(planned):
        points = [
            (x, peak / 2**30 if peak else math.nan) for x, peak in zip(seen, planned, strict=True)
        ]
        lines.append(Line("planned", points, 7, dashed=True))
    return line_chart(
        lines,
        _bands(steps),
        label="peak memory over training tokens",
        x_label="tokens trained on",
        zero=True,
    )


def _layout(facts: Values) -> str:
    rows = {layout["length"]: layout["segments"] for layout in facts.get("layouts", [])}
    return layout_chart(list(rows.items())) if rows else ""


def _plan(steps: list[Values], facts: Values) -> str:
    if not steps:
        return ""
    rows = []
    for stage, group in itertools.groupby(steps, key=lambda step: step["stage"]):
        of_stage = list(group)
        planned = planned_sent(of_stage)
        busiest = max(max(step["sent_bytes"]) for step in of_stage)
        equal = sent_as_planned(of_stage)
        peak = max(max(step["peak_memory_bytes"]) for step in of_stage)
        guess = planned_peak(facts, stage)
        rate = sorted(step["tokens_per_s"] for step in of_stage)[len(of_stage) // 2]
        rows.append(
            [
                f"{of_stage[0]['sequence_length']:,}",
                f"{len(of_stage):,}",
                f"{planned:,}" if planned is not None else "no plan",
                f"{busiest:,}",
                f'<span class="{"good" if equal else "bad"}">{"yes" if equal else "no"}</span>'
                if planned is not None
                else "",
                f"{guess / 2**30:.2f}" if guess else "no plan",
                f"{peak / 2**30:.2f}",
                f"{rate:,.0f}",
            ]
        )
    head = [
        "length",
        "steps",
        "planned bytes",
        "sent bytes",
        "equal",
        "planned GiB",
        "peak GiB",
        "median tokens/s",
    ]
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def planned_peak(facts: Values, stage: int) -> int:
    """The planned peak of a stage's busiest rank, bytes; 0 where run.json has none.

    Its plan is that of the last start: an earlier one may have had more stages.
    """
    peaks = facts.get("planned_peak_memory_bytes") or []
    return max(peaks[stage], default=0) if stage < len(peaks) else 0


def planned_sent(steps: list[Values]) -> int | None:
    """The most bytes that one rank should send in one of the steps; None without a plan."""
    return max(
        (max(step["planned_bytes"]) for step in steps if step["planned_bytes"]), default=None
    )


def sent_as_planned(steps: list[Values]) -> bool:
    """Whether every step sent what was planned for it: a resume may change the degrees."""
    planned = [step for step in steps if step["planned_bytes"]]
    return all(step["sent_bytes"] == step["planned_bytes"] for step in planned)


def _bands(steps: list[Values]) -> list[Band]:
    """The stages, as spans of tokens trained on."""
    bands, start = [], 0.0
    seen = iter(_tokens(steps))
    for _, group in itertools.groupby(steps, key=lambda step: step["stage"]):
        length = 0
        stop = start
        for step in group:
            length, stop = step["sequence_length"], next(seen)
        bands.append(Band(f"{length:,}", start, stop))
        start = stop
    return bands if len(bands) > 1 else []


def _tokens(steps: list[Values]) -> list[float]:
    """Tokens trained on up to and including each step."""
    return list(itertools.accumulate(step["tokens_per_s"] * step["step_s"] for step in steps))


def _bits(loss: float | None) -> float:
    return math.nan if loss is None else loss / math.log(2)


def _plain(loss: float | None) -> float:
    return math.nan if loss is None else loss


def _unit(summary: Values) -> str:
    return "bits per byte" if "order0_bits_per_byte" in summary else "bits per token"


def _reason(status: Values) -> str:
    if not status.get("reason"):
        return ""
    return f'<section class="bad"><pre>{escape(status["reason"])}</pre></section>'


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _section(title: str, subtitle: str, body: str) -> str:
    if not body:
        return ""
    return f'<section><h2>{title}</h2><p class="sub">{subtitle}</p>{body}</section>'


def _details(title: str, text: str) -> str:
    if not text:
        return ""
    return f"<section><details><summary>{title}</summary><pre>{text}</pre></details></section>"


def _pairs(values: Values) -> str:
    width = max((len(name) for name in values), default=0)
    return "\n".join(f"{escape(n):<{width}}  {escape(str(v))}" for n, v in values.items())


def _colours() -> str:
    return "\n".join(
        f".line{c} {{ stroke: var(--c{c}); }} .dot{c}, .fill{c} {{ fill: var(--c{c}); }} "
        f".key{c} {{ background: var(--c{c}); }}"
        for c in range(COLOURS)
    )
