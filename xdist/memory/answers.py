"""Counting right answers while a loss is computed: its tiles' logits exist at no other time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Answers:
    """Of the tokens with a label that counts: how many were seen, and whose likeliest is right.

    confusion: int64 [classes, classes], how often the class of the row was answered by that of the
    column; None where nobody asked for it.
    """

    def __init__(self, classes: int = 0) -> None:
        self.seen = torch.zeros((), dtype=torch.int64)
        self.right = torch.zeros((), dtype=torch.int64)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64) if classes else None


class _Mode(threading.local):
    counting: Answers | None = None


_mode = _Mode()


@contextmanager
def counting_answers(classes: int = 0) -> Iterator[Answers]:
    """Count the answers of this rank's tokens in every `xdist.cross_entropy` called inside, and in
    every model's loss that is made of it; with a number of classes also which was taken for which.
    Nested: the inner count alone."""
    before, _mode.counting = _mode.counting, Answers(classes)
    try:
        yield _mode.counting
    finally:
        _mode.counting = before


def count_answers(logits: Tensor, labels: Tensor, kept: Tensor) -> None:
    """Count a tile's, where somebody wants them: logits [T, V], labels int64 [T], kept bool [T]."""
    answers = _mode.counting
    if answers is None:
        return
    found = logits.argmax(-1)
    right = (found == labels) & kept
    answers.seen = answers.seen.to(kept.device) + kept.sum()
    answers.right = answers.right.to(kept.device) + right.sum()
    if answers.confusion is not None:
        size = answers.confusion.shape[0]
        pairs = torch.bincount(labels[kept] * size + found[kept], minlength=size * size)
        answers.confusion = answers.confusion.to(kept.device) + pairs.view(size, size)
