"""The report as aligned plain text, one line per rank count and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xdist.certify.judge import Report, Row

HEADINGS = ("ranks", "dtype", "outputs", "loss", "gradients", "worst gradient", "leak", "sent")


def render(report: Report) -> str:
    """Largest relative errors against one rank in float64; bytes sent, summed over ranks."""
    lines = [HEADINGS, *(_cells(row) for row in report.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    title = f"largest relative error against one rank in float64: {report.request.told}"
    verdict = [f"FAILED {finding}" for finding in report.findings] or ["passed"]
    return "\n".join([title, *(line.rstrip() for line in text), *verdict])


def _cells(row: Row) -> tuple[str, ...]:
    planned = "" if row.planned_bytes is None else f" of {row.planned_bytes:,} planned"
    return (
        str(row.ranks) if row.dim is None else f"{row.ranks}, dim {row.dim}",
        row.dtype,
        f"{row.outputs:.1e}",
        f"{row.loss:.1e}",
        f"{row.gradient:.1e}",
        row.worst,
        f"{row.leak:.1e}",
        f"{row.sent_bytes:,} bytes{planned}",
    )
