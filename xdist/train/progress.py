"""What a person sees while it trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from xdist.console import say

# A report needs `duration` of this file, and no torch.
if TYPE_CHECKING:
    from rich.console import Console

    from xdist.config import Config
    from xdist.train.metrics import StepMetrics


BYTES = "bits/byte"  # what a loss is where nobody says


class Progress(Protocol):
    """Told of each step and each notable line."""

    def step(self, metrics: StepMetrics) -> None:
        """One optimizer step was made."""

    def say(self, line: str) -> None:
        """One notable line: resumed, saved, evaluated, skipped."""

    def close(self) -> None:
        """The run is over."""


class Silent:
    """Every rank but the first."""

    def step(self, metrics: StepMetrics) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Clock:
    """Time left, from the tokens still to come and the pace of the latest steps."""

    def __init__(self, config: Config, start_step: int) -> None:
        self._tokens = step_tokens(config)
        self._start_step = start_step
        self._pace = 0.0

    def left_s(self, metrics: StepMetrics) -> float:
        """Seconds until the last step, as it looks now."""
        new = metrics.tokens_per_s
        # The first step also warms caches and compiles: it says little about the next ones.
        fresh = metrics.step <= self._start_step + 2
        self._pace = new if fresh or not self._pace else 0.8 * self._pace + 0.2 * new
        return sum(self._tokens[metrics.step :]) / max(self._pace, 1e-9)


def step_tokens(config: Config) -> list[int]:
    """Tokens of each optimizer step of the curriculum."""
    return [
        config.tokens_of(stage) * stage.batch * config.train.accumulation
        for stage in config.train.curriculum
        for _ in range(stage.steps)
    ]


class Lines:
    """Plain lines: one every `log.every_steps` steps, and the last one."""

    def __init__(
        self, config: Config, start_step: int, stream: TextIO, measure: str = BYTES
    ) -> None:
        self._every = config.log.every_steps
        self._total = config.train.total_steps
        self._clock = Clock(config, start_step)
        self._stream, self._measure = stream, measure

    def step(self, metrics: StepMetrics) -> None:
        """Print a line when it is due."""
        left = self._clock.left_s(metrics)
        if metrics.step % self._every == 0 or metrics.step == self._total:
            self.say(line(metrics, self._total, left, self._measure))

    def say(self, line: str) -> None:
        """Print a line."""
        say(line, self._stream)

    def close(self) -> None:
        """Nothing to put away."""


class Live:
    """A terminal: one panel that stays in place, notable lines scroll above it."""

    def __init__(
        self, config: Config, start_step: int, console: Console, measure: str = BYTES
    ) -> None:
        from rich.live import Live as Display

        self._config, self._measure = config, measure
        self._total = config.train.total_steps
        self._clock = Clock(config, start_step)
        self._console = console
        self._done_tokens = step_tokens(config)
        self._last = 0.0
        self._display = Display(console=console, refresh_per_second=8, transient=False)
        self._display.start()

    def step(self, metrics: StepMetrics) -> None:
        """Redraw, at most ten times a second: short steps should not pay for the display."""
        left = self._clock.left_s(metrics)
        now = time.monotonic()
        if metrics.step < self._total and now - self._last < 0.1:
            return
        self._last = now
        done = sum(self._done_tokens[: metrics.step]) / sum(self._done_tokens)
        self._display.update(self._panel(metrics, done, left))

    def say(self, line: str) -> None:
        """A line above the panel; none where the terminal is gone, which ends no run."""
        with contextlib.suppress(OSError):
            self._console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last panel on the screen and give the cursor back."""
        with contextlib.suppress(OSError):
            self._display.stop()

    def _panel(self, metrics: StepMetrics, done: float, left_s: float) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        stages = len(self._config.train.curriculum)
        fields = [
            ("step", f"{metrics.step}/{self._total}"),
            ("length", f"{metrics.sequence_length:,}"),
            ("loss", f"{metrics.loss:.4f}"),
            *_bits(metrics, self._measure),
            ("tokens/s", f"{metrics.tokens_per_s:,.0f}"),
            ("memory/rank", memory(metrics.peak_memory_bytes)),
            ("left", duration(left_s)),
        ]
        table = Table.grid(padding=(0, 2), expand=False)
        for _, value in fields:
            # Wide enough for what is still to come, so that the panel does not jump about.
            table.add_column(justify="right", no_wrap=True, min_width=max(9, len(value)))
        table.add_row(*(Text(name, style="dim") for name, _ in fields))
        table.add_row(*(Text(value, style="bold") for _, value in fields))
        whole = Table.grid(padding=(0, 0))
        whole.add_row(table)
        whole.add_row(ProgressBar(total=1.0, completed=done, width=84))
        title = f"{self._config.run.name}  ·  stage {metrics.stage + 1} of {stages}"
        return Panel(whole, title=title, title_align="left", expand=False, border_style="dim")


def open_progress(config: Config, rank: int, start_step: int, measure: str) -> Progress:
    """The display of this rank: none but on rank 0, live when standard output is a terminal;
    measure: what the loss is (`Workload.measure`)."""
    if rank != 0:
        return Silent()
    if not sys.stdout.isatty():
        return Lines(config, start_step, sys.stdout, measure)
    from rich.console import Console

    return Live(config, start_step, Console(), measure)


def line(metrics: StepMetrics, total: int, left_s: float, measure: str = BYTES) -> str:
    """One step as one plain line."""
    bits = "".join(f"bits {value}  " for _, value in _bits(metrics, measure))
    skipped = f"  SKIPPED {metrics.skipped}" if metrics.skipped else ""
    return (
        f"step {metrics.step}/{total}  length {metrics.sequence_length}  "
        f"loss {metrics.loss:.4f}  {bits}"
        f"{metrics.tokens_per_s:,.0f} tokens/s  memory {memory(metrics.peak_memory_bytes)}  "
        f"left {duration(left_s)}{skipped}"
    )


def memory(peaks: list[int]) -> str:
    """The ranks' peaks as `1.21 GiB`, or `1.10-1.21 GiB` where they differ."""
    low, high = (f"{value / 2**30:.2f}" for value in (min(peaks), max(peaks)))
    return f"{high} GiB" if low == high else f"{low}-{high} GiB"


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _bits(metrics: StepMetrics, measure: str) -> list[tuple[str, str]]:
    """The loss in bits and their name, where it is a cross entropy."""
    bits = f"{metrics.bits_per_token:.3f}"
    return [(measure, bits)] if measure.startswith("bits") else []
