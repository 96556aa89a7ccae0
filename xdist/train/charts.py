"""Line charts, bars and layouts as inline SVG. Colours come from the page's CSS variables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 880, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 26, 34
COLOURS = 8


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: points (x, y) in the units of the axes; gaps where y is not finite."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Band:
    """A named span of the x axis."""

    name: str
    start: float
    stop: float


def line_chart(
    lines: Sequence[Line], bands: Sequence[Band], *, label: str, x_label: str, zero: bool = False
) -> str:
    """Curves over one x axis, with named bands behind them. `label` describes it to a reader who
    cannot see it; `zero` makes the y axis start at 0."""
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return '<p class="none">nothing was measured</p>'
    x_low, x_high = _span([x for x, _ in points] + [e for b in bands for e in (b.start, b.stop)])
    y_low, y_high = _span([y for _, y in points])
    y_low = 0.0 if zero else y_low - 0.04 * (y_high - y_low)
    y_high += 0.06 * (y_high - y_low)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_open(WIDTH, HEIGHT, label)]
    for number, band in enumerate(bands):
        x0, x1 = at(band.start, y_low)[0], at(band.stop, y_low)[0]
        shade = "band odd" if number % 2 else "band"
        high = HEIGHT - TOP - BOTTOM
        parts.append(
            f'<rect class="{shade}" x="{x0:.1f}" y="{TOP}" width="{x1 - x0:.1f}" height="{high}"/>'
        )
        # A label only where it fits.
        if x1 - x0 > 7 * len(band.name):
            middle = (x0 + x1) / 2
            parts.append(
                f'<text class="tick mid" x="{middle:.1f}" y="16">{escape(band.name)}</text>'
            )
    for value in ticks(y_low, y_high, 5):
        y = at(x_low, value)[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{short(value)}</text>'
        )
    for value in ticks(x_low, x_high, 8):
        x = at(value, y_low)[0]
        y = HEIGHT - BOTTOM + 17
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{y}">{short(value)}</text>')
    parts.append(
        f'<text class="tick end" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">{escape(x_label)}</text>'
    )
    parts += [_curve(line, [at(x, y) for x, y in line.points]) for line in lines]
    parts.append("</svg>")
    return "".join(parts) + _legend(lines)


def bar_chart(bars: Sequence[tuple[str, float, bool]], *, label: str) -> str:
    """Horizontal bars (name, value, highlighted), from 0, with their values written out."""
    row, name_width = 30, 170
    height = row * len(bars) + 4
    most = max((value for _, value, _ in bars), default=1.0) or 1.0
    parts = [_open(WIDTH, height, label)]
    for number, (name, value, highlighted) in enumerate(bars):
        y = number * row + 4
        width = max(2.0, (WIDTH - name_width - 90) * value / most)
        shade = "bar main" if highlighted else "bar"
        parts.append(
            f'<text class="name end" x="{name_width - 10}" y="{y + 16}">{escape(name)}</text>'
            f'<rect class="{shade}" x="{name_width}" y="{y}" width="{width:.1f}" height="22" '
            f'rx="3"/>'
            f'<text class="name" x="{name_width + width + 8:.1f}" y="{y + 16}">{value:.3f}</text>'
        )
    return "".join(parts) + "</svg>"


def layout_chart(rows: Sequence[tuple[int, Sequence[Sequence[tuple[int, int]]]]]) -> str:
    """Who holds which positions: one bar a stage, (length, segments of each rank)."""
    row, name_width = 34, 110
    height = row * len(rows) + 4
    parts = [_open(WIDTH, height, "which rank holds which positions of the sequence, by stage")]
    ranks = max((len(segments) for _, segments in rows), default=0)
    for number, (length, by_rank) in enumerate(rows):
        y = number * row + 4
        scale = (WIDTH - name_width - RIGHT) / max(length, 1)
        parts.append(f'<text class="name end" x="{name_width - 10}" y="{y + 17}">{length:,}</text>')
        for rank, segments in enumerate(by_rank):
            for start, stop in segments:
                x, width = name_width + start * scale, max(0.5, (stop - start) * scale - 1.5)
                told = f"rank {rank}: positions {start:,} to {stop:,}"
                parts.append(
                    f'<rect class="fill{rank % COLOURS}" x="{x:.1f}" y="{y}" width="{width:.1f}" '
                    f'height="24" rx="3"><title>{told}</title></rect>'
                )
                if width > 56:
                    parts.append(
                        f'<text class="inside mid" x="{x + width / 2:.1f}" y="{y + 16}">'
                        f"rank {rank}</text>"
                    )
    return "".join(parts) + "</svg>" + _legend([Line(f"rank {r}", [], r) for r in range(ranks)])


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers in [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: `1.5M`, `20k`, `0.25`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _curve(line: Line, points: list[tuple[float, float]]) -> str:
    style = f"line{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
    runs: list[list[tuple[float, float]]] = [[]]
    for point, (_, y) in zip(points, line.points, strict=True):
        if math.isfinite(y):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    parts = [
        f'<polyline class="{style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in run)}">'
        f"<title>{escape(line.name)}</title></polyline>"
        for run in runs
        if len(run) > 1 and not line.dots
    ]
    # A curve of one point would not be seen.
    marked = [p for run in runs for p in run] if line.dots or len(points) == 1 else []
    values = [y for _, y in line.points if math.isfinite(y)]
    parts += [
        f'<circle class="dot{line.colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
        f"<title>{escape(line.name)}: {value:.4g}</title></circle>"
        for (x, y), value in zip(marked, values, strict=False)
    ]
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    items = []
    for line in lines:
        shape = "round" if line.dots else "dash" if line.dashed else "flat"
        key = f'<i class="key {shape} key{line.colour % COLOURS}"></i>'
        items.append(f"<span>{key}{escape(line.name)}</span>")
    return f'<div class="legend">{"".join(items)}</div>'


def _open(width: int, height: int, label: str) -> str:
    text = escape(label, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text}">'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    width = abs(high) or 1.0
    return low - 0.05 * width, high + 0.05 * width
