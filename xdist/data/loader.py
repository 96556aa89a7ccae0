"""Batches of each rank's own slice, read ahead by one thread.

For a request (which samples, under which layout) a rank reads, of each of its rows, only its own
segments and the one byte after each of them: labels are the next token by global position. A
task's store has its own labels, which are read beside the same segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from xdist.data.order import sample_start
from xdist.data.read_ahead import ReadAhead
from xdist.data.store import Split
from xdist.errors import DataError, DocumentsError, GeometryError
from xdist.layout import Layout

IGNORED = -100


@dataclass(frozen=True)
class Request:
    """One global batch: the cursor of its first sample, each row's start, and the layout.

    The sample of row r is `[starts[r], starts[r] + layout.length)` of the split.
    """

    cursor: int
    starts: tuple[int, ...]
    layout: Layout

    @classmethod
    def draw(
        cls, seed: int, cursor: int, batch: int, layout: Layout, store_length: int, first: int = 0,
        unit: int = 1,
    ) -> Request:  # fmt: skip
        """The batch at `cursor`: `batch` samples in the order of `order.sample_start`."""
        starts = tuple(
            sample_start(seed, cursor + row, store_length, layout.length, first=first, unit=unit)
            for row in range(batch)
        )
        return cls(cursor, starts, layout)


@dataclass(frozen=True)
class Batch:
    """This rank's part of a request: rows of its data rank, positions of its sequence rank.

    Attributes:
        request: what was asked for.
        rows: which rows of the request these are.
        tokens, labels: int64 `[B, n]`, in the order of the rank's segments. A label is -100 at the
            end of the store, at the end of a document (documents "separate"), and in bad rows; of
            a task, wherever no answer is scored, and at no end.
        cu_seqlens: the sample's documents when they are separate, else None.
        bad: `(row of this batch, why)` for rows whose slice could not be read here. Every sequence
            rank must drop the same rows: agree on them, then call `without`.
    """

    request: Request
    rows: range
    tokens: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: tuple[int, ...] | None
    bad: tuple[tuple[int, str], ...] = ()

    @property
    def valid_tokens(self) -> int:
        """Tokens with a label that counts."""
        return int((self.labels >= 0).sum())

    def without(self, rows: Iterable[int]) -> Batch:
        """The same batch with every label of `rows` (indices into this batch) ignored."""
        dropped = list(rows)
        if not dropped:
            return self
        tokens, labels = self.tokens.clone(), self.labels.clone()
        tokens[dropped] = 0
        labels[dropped] = IGNORED
        return replace(self, tokens=tokens, labels=labels)


class BadSamples:
    """Counts the samples that were dropped, and stops at the cap (`data.max_bad`)."""

    def __init__(self, max_bad: int) -> None:
        self.max_bad = max_bad
        self.count = 0

    def add(self, count: int, why: str = "") -> None:
        """Count `count` more dropped samples, the same on all ranks.

        Raises:
            DataError: more than `max_bad` in all.
        """
        self.count += count
        if self.count > self.max_bad:
            raise DataError(
                f"{self.count} samples could not be read",
                f"data.max_bad is {self.max_bad}" + (f"; the last: {why}" if why else ""),
                "repair the store with `xdist prepare`, or raise data.max_bad",
            )


class Place(NamedTuple):
    """Where a rank stands: which rows it takes, and which segments of them."""

    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0


ALONE = Place()


def read_batch(
    split: Split,
    request: Request,
    place: Place = ALONE,
    *,
    documents: Literal["join", "separate"] = "join",
    on_bad: Literal["stop", "skip"] = "stop",
) -> Batch:
    """Read this rank's part of `request`.

    Raises:
        GeometryError: the batch does not divide by the data degree.
        DocumentsError: separate documents and more than one row a data rank (rows of one batch
            share their documents).
        DataError: a slice cannot be read and `on_bad` is "stop"; names chunk and sample.
    """
    rows = rows_of(len(request.starts), place.data_rank, place.data_size)
    check_documents(len(rows), documents)
    check_samples(split, request.layout.length, documents)
    segments = request.layout.segments(place.sequence_rank)
    length = request.layout.local_length(place.sequence_rank)
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    bad: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        start = request.starts[row]
        try:
            _fill(split, start, segments, tokens[index], labels[index])
        except DataError as error:
            sample = f"sample {request.cursor + row} (positions {start} to "
            sample += f"{start + request.layout.length} of {split.name})"
            if on_bad == "stop":
                raise DataError(f"{error.what}, needed by {sample}", error.why, error.do) from error
            tokens[index], labels[index] = 0, IGNORED
            bad.append((index, f"{sample}: {error.what}"))
    cu_seqlens: tuple[int, ...] | None = None
    if documents == "separate":
        start, whole = request.starts[rows[0]], request.layout.length
        # One token more than the sample: a document may start right after it.
        cuts = split.documents(start, min(start + whole + 1, split.length))[:-1]
        cu_seqlens = (*(cut for cut in cuts if cut < whole), whole)
        if split.sample_length is None:
            following = request.layout.positions(place.sequence_rank) + 1
            labels[:, np.isin(following, np.asarray(cuts, dtype=np.int64))] = IGNORED
    return Batch(
        request, rows, torch.from_numpy(tokens), torch.from_numpy(labels), cu_seqlens, tuple(bad)
    )


def rows_of(batch: int, data_rank: int, data_size: int) -> range:
    """The rows of a global batch that one data rank holds: consecutive ones, equally many each."""
    if batch % data_size:
        raise GeometryError(
            "the batch does not divide by the data degree",
            f"{batch} sequences over {data_size} data ranks",
            f"use a batch of {batch - batch % data_size or data_size} or "
            f"{batch + data_size - batch % data_size}",
        )
    share = batch // data_size
    return range(data_rank * share, (data_rank + 1) * share)


def check_documents(rows: int, documents: str) -> None:
    """Refuse separate documents with several rows a data rank: `rows` share their documents."""
    if documents == "separate" and rows != 1:
        raise DocumentsError(
            'data.documents = "separate" needs one sequence per data rank and micro-step',
            f"{rows} rows a data rank, each cut into documents at other places",
            'use a batch equal to the data degree and more accumulation, or documents = "join"',
        )


def check_samples(split: Split, length: int, documents: str) -> None:
    """Refuse sequences that would cut a task's samples, or let them see each other."""
    sample = split.sample_length
    if sample is None or length == sample or (documents == "separate" and length % sample == 0):
        return
    raise DataError(
        f"sequences of {length} tokens do not fit the samples of {split.name}",
        f"a sample of this task has {sample} tokens; what is asked in one is told in it",
        f"use length {sample}, or a multiple of it with data.documents=separate",
    )


def _fill(
    split: Split,
    start: int,
    segments: Iterable[tuple[int, int]],
    tokens: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
) -> None:
    """Read one row's segments, with the one token after each that is its last label."""
    offset = 0
    for first, last in segments:
        size = last - first
        if split.sample_length is not None:
            here = slice(offset, offset + size)
            tokens[here] = split.read(start + first, start + last)
            answers = split.labels(start + first, start + last)
            labels[here] = np.where(answers < 0, IGNORED, answers)
            offset += size
            continue
        read = split.read(start + first, min(start + last + 1, split.length))
        tokens[offset : offset + size] = read[:size]
        labels[offset : offset + read.size - 1] = read[1 : size + 1]
        offset += size


class Loader(ReadAhead[Batch]):
    """Iterates over this rank's batches; a thread reads `prefetch` of them ahead (`ReadAhead`).

    Args:
        split: where the samples lie.
        requests: one per micro-step, in order; drawn from the reading thread.
        place: which rows and segments are this rank's.
        documents, on_bad: as in `read_batch`.
        prefetch: batches read ahead; 0 reads in the caller's thread.
    """

    def __init__(
        self,
        split: Split,
        requests: Iterable[Request],
        place: Place = ALONE,
        *,
        documents: Literal["join", "separate"] = "join",
        on_bad: Literal["stop", "skip"] = "stop",
        prefetch: int = 2,
    ) -> None:
        batches = (
            read_batch(split, request, place, documents=documents, on_bad=on_bad)
            for request in requests
        )
        super().__init__(batches, prefetch)
