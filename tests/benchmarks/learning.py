"""What small models learn: recall of the recurrences, of hybrids, of larger states; a passkey.

Models of one width and two mixers (hybrids and shares: six) learn synthetic tasks for some hundred
steps, five seeds each; every run has data and initial weights of its own seed, the same for all
models. Two processes with one thread each work through the runs; each result is kept at once in
data-cache/learning.json, so that a second call goes on. What was expected stands beside what was
found.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEEDS = 5
WORKERS = 2
HEAD_DIM = 8
DIMS = {"recall": 32, "passkey": 64}
# Every mixer reads the token before: a recall of pairs is then a matter of its memory alone.
CONV = 4
ATTENTION = ("attention", {"head_dim": HEAD_DIM})
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ATTENTION,
    "linear": ("linear", {"head_dim": HEAD_DIM}),
    "gla": ("gla", {"head_dim": HEAD_DIM, "expand_k": 1.0, "conv_width": CONV}),
    "deltanet": ("deltanet", {"head_dim": HEAD_DIM, "conv_width": CONV}),
    "gated_deltanet": ("gated_deltanet", {"head_dim": HEAD_DIM, "conv_width": CONV}),
    "gated_deltanet, heads of 16": ("gated_deltanet", {"head_dim": 16, "conv_width": CONV}),
    **{
        # Two heads of 4: one partition is then too small for eight pairs, so that more can help.
        f"sse, {n} partitions": ("sse", {"head_dim": 4, "heads": 2, "partitions": n})
        for n in (1, 2, 4)
    },
    # Reads the token before, and nothing else.
    "local": ("attention", {"head_dim": HEAD_DIM, "window": 1}),
}


@dataclass(frozen=True)
class Stage:
    """Steps on samples of one length."""

    length: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Setting:
    """One model on one task. above: the model of the same table that it is expected to beat."""

    table: str
    label: str
    mixers: tuple[str, ...]
    above: str = ""
    task: str = "recall"
    learning_rate: float = 1e-2


RECALL = (Stage(32, 64, 1000),)
PASSKEY = (Stage(160, 32, 500), Stage(2048, 2, 120))
STAGES = {"recall": RECALL, "passkey": PASSKEY}
OPTIONS = {"recall": {"vocab": 32, "pairs": 8, "queries": 8}, "passkey": {}}
EVALUATED = {"recall": ((32, 256),), "passkey": ((2048, 32), (16384, 16))}


def _pure(table: str, mixer: str, above: str = "") -> Setting:
    return Setting(table, mixer, ("local", mixer), above)


def _share(label: str, mixers: tuple[str, ...], above: str = "") -> Setting:
    return Setting("share of full layers", label, ("local", *mixers), above)


SETTINGS = (
    _pure("recurrences", "linear"),
    _pure("recurrences", "gla", "linear"),
    _pure("recurrences", "deltanet", "gla"),
    _pure("recurrences", "gated_deltanet", "gla"),
    _share("0 of 2", ("linear", "linear")),
    _share("1 of 2", ("linear", "attention"), "0 of 2"),
    _share("2 of 2", ("attention", "attention"), "1 of 2"),
    _pure("partitions of sparse state expansion", "sse, 1 partitions"),
    _pure("partitions of sparse state expansion", "sse, 2 partitions", "sse, 1 partitions"),
    _pure("partitions of sparse state expansion", "sse, 4 partitions", "sse, 2 partitions"),
    Setting("passkey", "gated_deltanet", ("gated_deltanet, heads of 16",) * 2, "", "passkey", 3e-3),
)


def run(root: Path, settings: tuple[Setting, ...] = SETTINGS, seeds: int = SEEDS) -> list[dict]:
    """One row a setting (and evaluated length)."""
    path = root / "data-cache" / "learning.json"
    known: dict[str, dict[str, Any]] = {}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    missing = [
        (setting, seed)
        for seed in range(seeds)
        for setting in settings
        if _key(setting, seed) not in known
    ]
    path.parent.mkdir(exist_ok=True)
    started = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=started) as pool:
        waiting = {pool.submit(train, setting, seed): (setting, seed) for setting, seed in missing}
        for done, future in enumerate(as_completed(waiting), 1):
            setting, seed = waiting[future]
            known[_key(setting, seed)] = future.result()
            beside = path.with_suffix(".new")
            beside.write_text(json.dumps(known), encoding="utf-8")
            os.replace(beside, path)
            said = ", ".join(f"{value:.3f}" for value in future.result()["accuracy"].values())
            print(
                f"{done}/{len(waiting)} {setting.table}: {setting.label}, {seed}: {said}",
                flush=True,
            )
    return list(_rows(settings, seeds, known))


def train(setting: Setting, seed: int) -> dict[str, Any]:
    """One run: accuracy by evaluated length, and its CPU time."""
    import numpy as np
    import torch
    from torch import Tensor
    from torch.nn.functional import cross_entropy

    from xdist.data.tasks import task_of

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = task_of({"recall": "mqar", "passkey": "passkey"}[setting.task], OPTIONS[setting.task])
    model, head = _model(setting, task.vocabulary_size)
    parameters = [*model.parameters(), head]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    stages = STAGES[setting.task]
    total, done, sample = sum(stage.steps for stage in stages), 0, 0
    began = time.process_time()

    def scored(length: int, stream: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Logits and answers of the scored tokens of some samples."""
        made = task.make(length, seed, stream, np.arange(first, first + count))
        tokens, labels = (torch.from_numpy(part) for part in made)
        kept = labels >= 0
        return model(tokens)[kept] @ head.t(), labels[kept]

    for stage in stages:
        for _ in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = setting.learning_rate * _rate(done, total)
            loss = cross_entropy(*scored(stage.length, 0, sample, stage.batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done, sample = done + 1, sample + stage.batch
    accuracy = {}
    with torch.no_grad():
        for length, count in EVALUATED[setting.task]:
            # One at a time where samples are long.
            step = max(1, 8192 // length)
            right = answers = 0
            for first in range(0, count, step):
                logits, wanted = scored(length, 1, first, min(step, count - first))
                right += int((logits.argmax(-1) == wanted).sum())
                answers += wanted.numel()
            accuracy[str(length)] = right / answers
    return {"accuracy": accuracy, "cpu_s": time.process_time() - began}


def _model(setting: Setting, vocabulary: int) -> Any:
    """Tokens [B, n] -> hidden states [B, n, C], and the head [vocabulary, C]."""
    import torch
    from torch import nn

    from xdist.nn import RMSNorm, build_mixer

    class Residual(nn.Module):
        def __init__(self, mixer: nn.Module) -> None:
            super().__init__()
            self.norm, self.mixer = RMSNorm(dim), mixer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mixer(self.norm(x))

    dim = DIMS[setting.task]
    table = nn.Embedding(vocabulary, dim)
    nn.init.normal_(table.weight, std=0.5)
    mixers = [build_mixer(name, dim, **given) for name, given in map(MIXERS.get, setting.mixers)]  # type: ignore[misc]
    layers = [Residual(mixer) for mixer in mixers]
    head = nn.Parameter(0.02 * torch.randn(vocabulary, dim))
    return nn.Sequential(table, *layers, RMSNorm(dim)), head


def _rate(step: int, steps: int) -> float:
    """Warm-up of 30 steps, then a cosine to a tenth."""
    return min(1.0, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _key(setting: Setting, seed: int) -> str:
    """All that a run depends on, so that changed settings are run again."""
    parts = [asdict(setting), [MIXERS[name] for name in setting.mixers], OPTIONS[setting.task]]
    stages = [asdict(stage) for stage in STAGES[setting.task]]
    return json.dumps(
        [*parts, stages, EVALUATED[setting.task], DIMS[setting.task], seed], sort_keys=True
    )


def _rows(
    settings: tuple[Setting, ...], seeds: int, known: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    found = {
        (one.table, one.label): [known[_key(one, seed)] for seed in range(seeds)]
        for one in settings
    }
    for one in settings:
        runs = found[one.table, one.label]
        for length in runs[0]["accuracy"]:
            values = [run["accuracy"][length] for run in runs]
            said = "-"
            if one.above:
                other = [run["accuracy"][length] for run in found[one.table, one.above]]
                said = _verdict(values, other)
            yield {
                "table": one.table,
                "layers": " + ".join(one.mixers),
                "evaluated at": int(length),
                "answers right (mean)": statistics.mean(values),
                "lowest": min(values),
                "highest": max(values),
                "expected": f"above {one.above}" if one.above else "-",
                "found": said,
                "CPU s a run": round(statistics.mean(run["cpu_s"] for run in runs)),
            }


def _verdict(values: list[float], other: list[float]) -> str:
    """Whether the mean is above the other's, and in how many seeds it is."""
    above = sum(a > b for a, b in zip(values, other, strict=True))
    word = "yes" if statistics.mean(values) > statistics.mean(other) else "no"
    return f"{word}, in {above} of {len(values)} seeds"
