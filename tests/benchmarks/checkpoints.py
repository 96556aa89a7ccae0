"""How long a save keeps the ranks from training, against a step: in the step, or in the background.

Trains the quickstart's model, and one of more than twice its width, on the real store. A save is
timed around the loop's call on every rank, the check that replicas are equal and the copy
included; with `checkpoint.asynchronous` also the later moments at which a save in flight goes on.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from xdist.config import load
from xdist.testing import run_ranks

CONFIG = "configs/quickstart.toml"
SAVES, EVERY = 4, 2
# case: (ranks, length of a sequence, further settings)
CASES = {
    "quickstart": (2, 1 << 16, ()),
    "dim 256": (2, 1 << 14, ("model.dim=256",)),
}


def _train(root: str, folder: str, ranks: int, length: int, more: list[str]) -> dict[str, Any]:
    """Train on this rank; seconds of each save and step, and what was saved."""
    from xdist.checkpoint import open_latest
    from xdist.train import run
    from xdist.train.keeper import Keeper
    from xdist.train.saving import Saving

    config = load(
        f"{root}/{CONFIG}",
        [
            f"run.directory={folder}",
            "run.name=bench",
            f"data.store={root}/data-cache/stdlib.zarr",
            f"parallel.ulysses={ranks}",
            f"launch.ranks={ranks}",
            f"train.curriculum=[{{length={length}, batch=1, steps={SAVES * EVERY + EVERY}}}]",
            f"checkpoint.every_steps={EVERY}",
            "evaluate.tokens=1024",
            "evaluate.length=1024",
            "log.every_steps=1000",
            *more,
        ],
    )
    saves: dict[int, float] = {}
    whole_save, advance = Keeper.save, Saving.advance

    def timed_save(self: Keeper, step: int) -> None:
        began = time.perf_counter()
        whole_save(self, step)
        saves[step] = saves.get(step, 0.0) + time.perf_counter() - began

    def timed_advance(self: Saving) -> Any:
        step, inside = self.in_flight, not self._settings.asynchronous
        began = time.perf_counter()
        outcome = advance(self)
        if not inside and step is not None:
            saves[step] = saves.get(step, 0.0) + time.perf_counter() - began
        return outcome

    Keeper.save, Saving.advance = timed_save, timed_advance  # type: ignore[method-assign]
    try:
        assert run(config) == 0
    finally:
        Keeper.save, Saving.advance = whole_save, advance  # type: ignore[method-assign]
    found = open_latest(config.run_directory / "checkpoints")
    assert found is not None
    lines = [
        json.loads(line)
        for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()
    ]
    steps = {line["step"]: line["step_s"] for line in lines if "eval" not in line}
    # The last save is waited for.
    saves = {step: seconds for step, seconds in saves.items() if step <= SAVES * EVERY}
    parameters = sum(s.count for name, s in found.specs.items() if name.startswith("model/"))
    return {"saves": saves, "steps": steps, "bytes": found.total_bytes, "parameters": parameters}


def run(root: Path) -> list[dict[str, Any]]:
    """One row a case and mode."""
    rows = []
    for case, (ranks, length, settings) in CASES.items():
        for behind in (False, True):
            more = [*settings, f"checkpoint.asynchronous={str(behind).lower()}"]
            with tempfile.TemporaryDirectory(prefix="xdist-bench-") as folder:
                found = run_ranks(_train, ranks, str(root), folder, ranks, length, more)
            rows.append(_row(case, ranks, length, behind, found))
            print(rows[-1], flush=True)
    return rows


def _row(
    case: str, ranks: int, length: int, behind: bool, found: list[dict[str, Any]]
) -> dict[str, Any]:
    steps = found[0]["steps"]
    # A step after a save is one in which a thread may write; the first step warms up.
    after = {step + 1 for step in found[0]["saves"]}
    quiet = statistics.median(s for step, s in steps.items() if step not in after and step > 1)
    busy = statistics.median(s for step, s in steps.items() if step in after)
    # Ranks wait for each other: the slowest one counts.
    saves = sorted(max(r["saves"][step] for r in found) for step in found[0]["saves"])
    blocked = statistics.median(saves)
    return {
        "model": case,
        "ranks": ranks,
        "tokens of a step": length,
        "parameters": found[0]["parameters"],
        "checkpoint (MB)": found[0]["bytes"] / 1e6,
        "save": "background" if behind else "in the step",
        "step (s)": quiet,
        "step after a save (s)": busy,
        "blocked (ms)": 1e3 * blocked,
        "longest (ms)": 1e3 * saves[-1],
        "blocked / step (%)": 100 * blocked / quiet,
    }
