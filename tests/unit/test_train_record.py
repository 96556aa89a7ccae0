"""The files of a run, the lines and the report made from them, without training anything."""

from __future__ import annotations

import io
import json
import mmap
import os
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from xdist.config import Config, override
from xdist.errors import PeerLost
from xdist.train import write_report
from xdist.train.charts import Band, Line, layout_chart, line_chart, short, ticks
from xdist.train.failures import record_failure
from xdist.train.metrics import PeakMemory, StepMetrics
from xdist.train.progress import Clock, Lines, Live, duration, memory
from xdist.train.record import Record, read_metrics, read_status
from xdist.train.summary import plan_lines

CONFIG = override(
    Config(),
    ["train.curriculum=[{length=10,batch=2,steps=3},{length=40,batch=1,steps=2}]"],
)


def _metrics(step: int, **changes: object) -> StepMetrics:
    values: dict = {
        "step": step,
        "stage": 0 if step <= 3 else 1,
        "sequence_length": 10 if step <= 3 else 40,
        "loss": 5.0 / step,
        "tokens_per_s": 20.0,
        "step_s": 1.0 if step <= 3 else 2.0,
        "learning_rate": 0.1,
        "grad_norm": 0.5,
        "sample_cursor": 2 * step,
        "peak_memory_bytes": [1 << 30, 3 << 29],
        "sent_bytes": [100, 90],
        "planned_bytes": [100, 90],
    }
    return StepMetrics(**(values | changes))


def _written(directory: pathlib.Path) -> Record:
    record = Record(directory, 0)
    record.open_metrics(0)
    for step in range(1, 6):
        record.metrics(_metrics(step).line())
    record.metrics({"step": 5, "eval": {"loss": 1.0, "bits_per_token": 1.44, "tokens": 9}})
    record.describe('[run]\nname = "<b>"\n', {"ranks": 2, "degrees": {"ulysses": 2}})
    record.status("finished", 5, exit_code=0)
    record.close()
    return record


def test_status_holds_what_the_design_says(tmp_path: pathlib.Path) -> None:
    record = Record(tmp_path / "run", 0)
    record.status("running", 3)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert list(status) == [
        "state", "step", "exit_code", "rank", "host", "reason", "last_checkpoint",
    ]  # fmt: skip
    assert (status["state"], status["step"], status["exit_code"]) == ("running", 3, None)
    # Nothing stays beside the file that was replaced.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


def test_what_ends_a_run_is_on_the_disk_before_it_has_its_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not so what is written in every step; readers take an emptied status for none."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_size))
    record = Record(tmp_path, 0)
    record.status("running", 3)
    assert flushed == []
    record.status("failed", 3, exit_code=4)
    record.describe("text", {})
    assert flushed == [(tmp_path / "status.json").stat().st_size, 4, 3]
    (tmp_path / "status.json").write_text("")
    assert read_status(tmp_path) == {}
    record_failure(PeerLost("gone"), record, 3)
    assert read_status(tmp_path)["exit_code"] == 7
    (tmp_path / "status.json").write_text('{"sta')
    assert "unknown" in write_report(tmp_path).read_text()


def test_numbers_that_are_not_finite_are_null(tmp_path: pathlib.Path) -> None:
    record = Record(tmp_path, 0)
    record.open_metrics(0)
    record.metrics(_metrics(1, loss=float("nan"), skipped="why").line())
    record.close()
    (line,) = read_metrics(tmp_path)
    assert line["loss"] is None
    assert line["skipped"] == "why"
    assert "skipped" not in _metrics(1).line()


def test_only_rank_0_writes(tmp_path: pathlib.Path) -> None:
    record = Record(tmp_path / "run", 1)
    record.open_metrics(0)
    record.metrics({"step": 1})
    record.describe("", {})
    record.close()
    assert not (tmp_path / "run").exists()


def test_lines_after_the_checkpoint_are_dropped(tmp_path: pathlib.Path) -> None:
    _written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    record = Record(tmp_path, 0)
    assert record.open_metrics(4) == 3
    record.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_peak_memory_is_that_of_the_span() -> None:
    import torch

    memory_of = PeakMemory(torch.device("cpu"))
    if not memory_of.exact:
        pytest.skip("this kernel does not set the high-water mark back")
    memory_of.start()
    before = memory_of.peak_bytes()
    held = mmap.mmap(-1, 96 << 20)  # always fresh pages: the heap may hold freed ones
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    with_block = memory_of.peak_bytes()
    assert with_block - before > 90 << 20
    held.close()
    memory_of.start()
    assert memory_of.peak_bytes() < with_block - (80 << 20)


def test_plain_lines_come_every_so_many_steps_and_at_the_end() -> None:
    stream = io.StringIO()
    lines = Lines(override(CONFIG, ["log.every_steps=2"]), 0, stream)
    for step in range(1, 6):
        lines.step(_metrics(step))
    text = stream.getvalue().splitlines()
    assert [line.split()[1] for line in text] == ["2/5", "4/5", "5/5"]
    assert text[0] == (
        "step 2/5  length 10  loss 2.5000  bits 3.607  20 tokens/s  memory 1.00-1.50 GiB  left 5 s"
    )


def test_time_left_counts_tokens_not_steps() -> None:
    clock = Clock(CONFIG, 0)
    assert clock.left_s(_metrics(1)) == pytest.approx((20 + 20 + 40 + 40) / 20)
    assert clock.left_s(_metrics(4)) == pytest.approx(40 / 20)


def test_a_terminal_shows_step_length_loss_bits_speed_memory_and_time() -> None:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    live = Live(CONFIG, 0, console)
    live.step(_metrics(5))
    live.say("held out")
    live.close()
    text = stream.getvalue()
    for word in ("stage 2 of 2", "5/5", "1.0000", "1.443", "bits/byte", "1.00-1.50 GiB", "0 s"):
        assert word in text
    assert "held out" in text


def test_words_for_time_and_memory() -> None:
    assert [duration(s) for s in (0.4, 59.7, 185, 7800)] == [
        "0 s", "1 min 00 s", "3 min 05 s", "2 h 10 min",
    ]  # fmt: skip
    assert memory([1 << 30]) == "1.00 GiB"


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.9, 8.2, 5) == [2, 4, 6, 8]
    assert short(1_500_000) == "1.5M"
    assert short(0.25) == "0.25"


def test_charts_of_little_or_nothing() -> None:
    assert "nothing was measured" in line_chart([], [], label="", x_label="")
    gap = Line("one", [(0.0, 1.0), (1.0, float("nan")), (2.0, 2.0), (3.0, 1.0)])
    svg = line_chart([gap], [Band("a", 0, 3)], label="loss", x_label="x")
    assert "nan" not in svg
    assert svg.count("<polyline") == 1
    flat = line_chart([Line("flat", [(1.0, 5.0)])], [], label="", x_label="")
    assert "<circle" in flat
    drawn = layout_chart([(8, [[(0, 2), (6, 8)], [(2, 6)], []])])
    assert drawn.count("<title>") == 3


class _Page(HTMLParser):
    """Collects tags and everything that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "rect", "line", "circle", "polyline"):
            self.open.append(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [name for name, _ in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle", "polyline"):
            assert self.open.pop() == tag


def test_the_report_is_one_page_that_loads_nothing(tmp_path: pathlib.Path) -> None:
    _written(tmp_path)
    text = write_report(tmp_path).read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "<script" not in text
    assert "&lt;b&gt;" in text
    for title in ("Loss", "Throughput", "Memory", "Plan and measurement", "Configuration"):
        assert f"{title}</" in text
    assert not re.search(r"\$[a-z]", text)
    assert "prefers-color-scheme: dark" in text


def test_a_report_after_a_resume_on_other_degrees_and_stages(tmp_path: pathlib.Path) -> None:
    """Each step is compared with its own plan, and run.json's may have fewer stages."""
    record = Record(tmp_path, 0)
    record.open_metrics(0)
    for step in range(1, 6):
        ranks = 2 if step < 3 else 1
        bytes_of = {"sent_bytes": [10 * ranks] * ranks, "planned_bytes": [10 * ranks] * ranks}
        peaks = {"peak_memory_bytes": [1 << 30] * ranks}
        record.metrics(_metrics(step, **bytes_of, **peaks).line())
    record.close()
    facts = {"ranks": 1, "planned_peak_memory_bytes": [[1 << 30]]}
    record.describe("", facts)
    record.status("finished", 5, exit_code=0)
    text = write_report(tmp_path).read_text()
    assert 'class="bad">no' not in text
    assert text.count('class="good">yes') == 2
    lines = plan_lines(read_metrics(tmp_path), facts)
    assert "20 bytes sent a step and rank (planned 20, equal in every step)" in lines[0]
    assert "(planned 1.00)" in lines[0]
    assert "peak 1.00 GiB, " in lines[1]


def test_a_report_of_a_failed_run_says_why(tmp_path: pathlib.Path) -> None:
    record = Record(tmp_path, 0)
    record.status("failed", 0, exit_code=5, reason="chunk <c/0> is missing")
    text = write_report(tmp_path).read_text()
    assert "chunk &lt;c/0&gt; is missing" in text
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        write_report(tmp_path / "nowhere")


def test_a_report_needs_no_torch() -> None:
    code = "import sys, xdist.train.report; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
