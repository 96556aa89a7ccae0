"""Counting right answers while a loss is computed: its tiles' logits exist at no other time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Answers:
    """Of the tokens with a label that counts: how many were seen, and whose likeliest is right."""

    def __init__(self) -> None:
        self.seen = torch.zeros((), dtype=torch.int64)
        self.right = torch.zeros((), dtype=torch.int64)


class _Mode(threading.local):
    counting: Answers | None = None


_mode = _Mode()


@contextmanager
def counting_answers() -> Iterator[Answers]:
    """Count the answers of this rank's tokens in every `xdist.cross_entropy` called inside, and in
    every model's loss that is made of it. Nested: the inner count alone."""
    before, _mode.counting = _mode.counting, Answers()
    try:
        yield _mode.counting
    finally:
        _mode.counting = before


def count_answers(logits: Tensor, labels: Tensor, kept: Tensor) -> None:
    """Count a tile's, where somebody wants them: logits [T, V], labels int64 [T], kept bool [T]."""
    answers = _mode.counting
    if answers is None:
        return
    right = (logits.argmax(-1) == labels) & kept
    answers.seen = answers.seen.to(kept.device) + kept.sum()
    answers.right = answers.right.to(kept.device) + right.sum()
