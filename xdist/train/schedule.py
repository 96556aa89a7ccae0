"""The learning rate of each optimizer step, as a pure function."""

from __future__ import annotations

import math

from xdist.config import Optimizer


def learning_rate(settings: Optimizer, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (0 is the first) of `total_steps`.

    Linear warm-up over `warmup_steps` (the first step already moves: it has 1/warmup of the
    peak), then half a cosine down to `final_ratio` of the peak at the last step, or the peak
    throughout when the schedule is constant. The whole curriculum is one schedule: a new stage
    does not restart it.
    """
    peak = settings.learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    falling = max(1, total_steps - 1 - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / falling)
    share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (settings.final_ratio + (1.0 - settings.final_ratio) * share)
