"""Synthetic tasks of recall and state: samples of one length, with the answers that are scored.

A sample is a pure function of (task, length, seed, stream, number): any run of samples can be made
anywhere. `make` gives tokens and labels of `numbers`, int64 [m, length] each: the label at a token
is the answer expected there, -1 where none is scored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import permutations
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from xdist.data.draw import below, draws, orders
from xdist.errors import ConfigError

Ints = NDArray[np.int64]
UNSCORED = -1


class Task(Protocol):
    """One kind of sample. `name` is its word on the command line."""

    name: ClassVar[str]

    @property
    def vocabulary_size(self) -> int:
        """Tokens and labels are below it."""

    def check(self, length: int) -> None:
        """Raises ConfigError when samples of `length` tokens cannot be made."""

    def make(self, length: int, seed: int, stream: int, numbers: Ints) -> tuple[Ints, Ints]:
        """Tokens and labels, [m, length] each."""


@dataclass(frozen=True)
class Mqar:
    """Multi-query associative recall (Arora et al. 2023, "Zoology", section 4 and appendix E).

    Keys and values in pairs, then the keys again, each at a distance drawn from a power law: the
    label at a repeated key is its value. Token 0 fills the gaps, keys are 1 .. vocab / 2 - 1,
    values the upper half of the vocabulary.
    """

    name: ClassVar[str] = "mqar"
    vocab: int = 8192
    pairs: int = 8
    queries: int = 8
    power: float = 0.01

    @property
    def vocabulary_size(self) -> int:
        return self.vocab

    def check(self, length: int) -> None:
        if not 4 <= self.vocab <= 1 << 31 or not 0 < self.power <= 1:
            _refuse("mqar: --vocab is from 4 to 2^31, power in (0, 1]", f"{self.vocab}")
        keys = self.vocab // 2 - 1
        if not 1 <= self.pairs <= keys:
            _refuse(
                "mqar: the keys of a sample differ",
                f"{self.pairs} pairs, and {keys} keys in a vocabulary of {self.vocab}",
            )
        room = (length - 2 * self.pairs) // 2
        if not 1 <= self.queries <= min(self.pairs, room):
            _refuse(
                "mqar: queries do not fit, each asks for another pair at every second place",
                f"{self.queries} queries, {self.pairs} pairs, (length {length} - 2 x {self.pairs}) "
                f"/ 2 = {room} places",
            )

    def make(self, length: int, seed: int, stream: int, numbers: Ints) -> tuple[Ints, Ints]:
        upper = self.vocab // 2
        room = (length - 2 * self.pairs) // 2
        counts = (self.pairs, self.pairs, room, self.pairs)
        words = np.split(draws(seed, stream, numbers, sum(counts)), np.cumsum(counts)[:-1], axis=1)
        keys = _distinct(words[0], upper - 1) + 1
        values = below(words[1], self.vocab - upper) + upper
        # Weighted draws without replacement: the smallest of exponential times with these rates
        # (Efraimidis and Spirakis 2006).
        weights = np.arange(1, room + 1, dtype=np.float64) ** (self.power - 1)
        times = -np.log((words[2] + 1.0) / 2.0**32) / weights
        places = np.argsort(times, axis=1, kind="stable")[:, : self.queries]
        asked = orders(words[3])[:, : self.queries]
        tokens = np.zeros((numbers.size, length), dtype=np.int64)
        labels = np.full_like(tokens, UNSCORED)
        tokens[:, 0 : 2 * self.pairs : 2], tokens[:, 1 : 2 * self.pairs : 2] = keys, values
        at = 2 * self.pairs + 2 * places
        np.put_along_axis(tokens, at, np.take_along_axis(keys, asked, 1), 1)
        np.put_along_axis(labels, at, np.take_along_axis(values, asked, 1), 1)
        return tokens, labels


@dataclass(frozen=True)
class Passkey:
    """A number hidden in idle text, asked for at its end, over bytes, at any length (the retrieval
    task of Mohtashami and Jaggi 2023, "Landmark attention", section 4.2).

    The digits of the answer stand at the end of the sample too; each is scored where the one
    before it is read.
    """

    name: ClassVar[str] = "passkey"
    digits: int = 5

    OPENING: ClassVar[bytes] = b"Somewhere below a number is told. Keep it in mind. "
    IDLE: ClassVar[bytes] = b"Rain falls on the hills. The river runs to the sea. Clouds rise. "
    NEEDLE: ClassVar[tuple[bytes, bytes]] = (b"The number is ", b". Do not forget it. ")
    QUESTION: ClassVar[bytes] = b"Which number was told? The number is "

    @property
    def vocabulary_size(self) -> int:
        return 256

    @property
    def shortest(self) -> int:
        """The length without any idle text."""
        fixed = (self.OPENING, *self.NEEDLE, self.QUESTION)
        return sum(map(len, fixed)) + 2 * self.digits

    def check(self, length: int) -> None:
        if not 1 <= self.digits <= 1000 or length < self.shortest:
            _refuse(
                "passkey: a sample holds opening, number, question and answer",
                f"{self.shortest} bytes with {self.digits} digits, --length is {length}",
            )

    def make(self, length: int, seed: int, stream: int, numbers: Ints) -> tuple[Ints, Ints]:
        words = draws(seed, stream, numbers, self.digits + 1)
        digits = below(words[:, 1:], 10) + ord("0")
        idle = length - self.shortest
        at = below(words[:, :1], idle + 1) + len(self.OPENING)
        before, after = (_bytes(part) for part in self.NEEDLE)
        rows = (numbers.size, -1)
        needle = np.concatenate(
            [
                np.broadcast_to(before, (numbers.size, before.size)),
                digits,
                np.broadcast_to(after, (numbers.size, after.size)),
            ],
            axis=1,
        )
        text = np.resize(_bytes(self.IDLE), idle)
        around = np.concatenate([_bytes(self.OPENING), text, _bytes(self.QUESTION)])
        width = needle.shape[1]
        place = np.arange(length - self.digits)[None]
        inside = (place >= at) & (place < at + width)
        outer = np.where(place < at, place, place - width)
        tokens = np.empty((numbers.size, length), dtype=np.int64)
        tokens[:, : -self.digits] = np.where(
            inside,
            np.take_along_axis(needle, np.clip(place - at, 0, width - 1), 1),
            around[np.clip(outer, 0, around.size - 1)],
        )
        tokens[:, -self.digits :] = digits.reshape(rows)
        labels = np.full_like(tokens, UNSCORED)
        labels[:, -self.digits - 1 : -1] = digits
        return tokens, labels


@dataclass(frozen=True)
class Copy:
    """A string of letters, a mark, and the string again (Jelassi et al. 2024, "Repeat after me",
    section 4): scored from the mark on, where each label is the next letter of the string."""

    name: ClassVar[str] = "copy"
    vocab: int = 64

    @property
    def vocabulary_size(self) -> int:
        return self.vocab

    def check(self, length: int) -> None:
        if not 2 <= self.vocab <= 1 << 31 or length < 2 or length % 2:
            _refuse(
                "copy: a sample is n letters, the mark, and n - 1 of the letters again",
                f"--length is {length}, --vocab is {self.vocab} (one of them the mark)",
                "choose an even length and a vocabulary of at least 2",
            )

    def make(self, length: int, seed: int, stream: int, numbers: Ints) -> tuple[Ints, Ints]:
        half = length // 2
        letters = below(draws(seed, stream, numbers, half), self.vocab - 1)
        mark = np.full((numbers.size, 1), self.vocab - 1, dtype=np.int64)
        tokens = np.concatenate([letters, mark, letters[:, :-1]], axis=1)
        labels = np.full_like(tokens, UNSCORED)
        labels[:, half:] = letters
        return tokens, labels


# Degree of the permutations, and whether only the even ones are taken.
GROUPS = {"parity": (2, False), "s3": (3, False), "a5": (5, True), "s5": (5, False)}


@dataclass(frozen=True)
class StateTracking:
    """Word problems of permutation groups (Merrill, Petty and Sabharwal 2024, "The illusion of
    state in state-space models", section 5): the label at each token is the product of all
    elements up to it.

    parity is the group of two elements: the label says whether the number of ones so far is odd.
    Elements are numbered in the order of their permutations, the identity first; of a product the
    later element acts last.
    """

    name: ClassVar[str] = "state_tracking"
    group: str = "s5"

    @property
    def vocabulary_size(self) -> int:
        return len(table_of(self.group))

    def check(self, length: int) -> None:
        if self.group not in GROUPS or length < 1:
            _refuse(f"state_tracking: no group {self.group!r}", f"there are {', '.join(GROUPS)}")

    def make(self, length: int, seed: int, stream: int, numbers: Ints) -> tuple[Ints, Ints]:
        table = table_of(self.group)
        tokens = below(draws(seed, stream, numbers, length), len(table))
        labels = tokens.copy()
        # Products of 1, 2, 4, ... elements up to each token.
        step = 1
        while step < length:
            labels[:, step:] = table[labels[:, :-step].copy(), labels[:, step:]]
            step *= 2
        return tokens, labels


TASKS: dict[str, type[Any]] = {one.name: one for one in (Mqar, Passkey, Copy, StateTracking)}


def task_of(name: str, options: dict[str, Any]) -> Task:
    """The task `name` with those options that are not None; the others as in its class.

    Raises:
        ConfigError: no such task, or an option that it does not have.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}", f"the tasks are {', '.join(TASKS)}")
    given = {key: value for key, value in options.items() if value is not None}
    known = [field.name for field in fields(TASKS[name])]
    if unknown := [key for key in given if key not in known]:
        raise ConfigError(
            f"task {name} has no option {', '.join(unknown)}",
            f"it has {', '.join(known)}",
            "leave it out",
        )
    made: Task = TASKS[name](**given)
    return made


def facts_of(task: Task) -> dict[str, Any]:
    """Name and options of a task, for a store's fingerprint."""
    return {"name": task.name, **asdict(task)}  # type: ignore[call-overload]


@lru_cache(maxsize=8)
def table_of(group: str) -> Ints:
    """[a, b] -> the number of "a, then b" among the group's elements."""
    degree, even = GROUPS[group]
    found = [p for p in permutations(range(degree)) if not even or not _odd(p)]
    number = {p: index for index, p in enumerate(found)}
    return np.array([[number[tuple(b[i] for i in a)] for b in found] for a in found])


def _odd(permutation: tuple[int, ...]) -> bool:
    pairs = [(i, j) for j in range(len(permutation)) for i in range(j)]
    return sum(permutation[i] > permutation[j] for i, j in pairs) % 2 == 1


def _distinct(words: NDArray[np.uint64], size: int) -> Ints:
    """Each row as that many different numbers in [0, size), every set and order alike.

    The k-th is the k-th of those still free (Fisher and Yates): found without a table of `size` by
    stepping over the ones that are taken.
    """
    rows, count = words.shape
    found = np.empty((rows, 0), dtype=np.int64)
    for k in range(count):
        value = below(words[:, k], size - k)
        for taken in np.sort(found, axis=1).T:
            value += value >= taken
        found = np.concatenate([found, value[:, None]], axis=1)
    return found


def _bytes(text: bytes) -> Ints:
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


def _refuse(what: str, why: str, do: str = "choose other options") -> None:
    raise ConfigError(what, why, do)
