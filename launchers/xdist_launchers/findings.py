"""What `xdist doctor` finds, and how it is shown: a table on a terminal, lines elsewhere, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.text import Text

State = Literal["ok", "note", "absent", "bad"]
_MARKS = {
    "ok": ("✓", "green"),
    "note": ("!", "yellow"),
    "absent": ("-", "dim"),
    "bad": ("✗", "red"),
}


@dataclass(frozen=True)
class Finding:
    """One fact: `note` is worth reading, `absent` an optional thing, `bad` stops xdist.

    `do` is the command or the step that mends or adds it.
    """

    group: str
    name: str
    text: str
    state: State = "ok"
    do: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    """3 when something needed is missing or broken, else 0."""
    return 3 if any(finding.state == "bad" for finding in findings) else 0


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line a finding: its name, what was found, what to do."""
    told = []
    for finding in findings:
        missing = finding.state == "bad" and not finding.text
        text = "MISSING" if missing else finding.text
        note = "note: " if finding.state == "note" else ""
        do = f"; {finding.do}" if finding.do else ""
        told.append(f"{finding.name:<13} {note}{text}{do}")
    return told


def as_json(findings: Sequence[Finding]) -> str:
    """The findings and the exit code as one JSON object."""
    listed = [asdict(finding) for finding in findings]
    return json.dumps({"exit_code": exit_code(findings), "findings": listed}, indent=1)


def show(findings: Sequence[Finding]) -> None:
    """A table on this terminal, by group, and what there is to do below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(width=1)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    group = ""
    for finding in findings:
        if finding.group != group:
            if group:
                table.add_row("", "", "")
            table.add_row("", Text(finding.group, style="bold cyan"), "")
            group = finding.group
        mark, style = _MARKS[finding.state]
        said = finding.text or "missing"
        text = Text(said, style="dim" if finding.state == "absent" else "")
        if finding.do:
            text.append(f"\n{finding.do}", style="italic")
        table.add_row(Text(mark, style=style), finding.name, text)
    console.print(table)
    console.print()
    console.print(_summary(findings))


def _summary(findings: Sequence[Finding]) -> Text:
    from rich.text import Text

    counts = {state: sum(f.state == state for f in findings) for state in _MARKS}
    if counts["bad"]:
        return Text("Something must be mended before xdist works here: see ✗ above.", "red")
    told = ["xdist works here"]
    told += [f"worth reading: {counts['note']} (!)"] * bool(counts["note"])
    told += [f"optional and absent: {counts['absent']} (-)"] * bool(counts["absent"])
    return Text("; ".join(told) + ".", "green")
