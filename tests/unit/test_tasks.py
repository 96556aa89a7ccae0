"""Synthetic tasks: what each sample says, solved without a model, and a pure function of a seed."""

from __future__ import annotations

import numpy as np
import pytest

from xdist.data.draw import below, draws, philox
from xdist.data.tasks import TASKS, Copy, Mqar, Passkey, StateTracking, Task, table_of, task_of
from xdist.errors import ConfigError

CASES: list[tuple[Task, int]] = [
    (Mqar(vocab=64, pairs=6, queries=4), 41),
    (Mqar(vocab=16, pairs=7, queries=7, power=1.0), 28),
    (Passkey(digits=7), 400),
    (Copy(vocab=9), 30),
    (StateTracking("s5"), 50),
    (StateTracking("parity"), 33),
]
NUMBERS = np.arange(300)


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], dtype=np.uint64) for value in values)


def test_philox_gives_the_known_answers() -> None:
    """The first, the last and the pi vector that its authors publish (Random123, kat_vectors)."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = {
        (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (ones,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (*pi, 0xA4093822, 0x299F31D0): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (*counter, low, high), wanted in cases.items():
        found = philox(words(*counter), (low, high))  # type: ignore[arg-type]
        assert tuple(int(word[0]) for word in found) == wanted


def test_draws_are_even_and_differ_by_seed_stream_and_sample() -> None:
    numbers = below(draws(3, 0, np.arange(2000), 50), 10)
    assert np.bincount(numbers.reshape(-1), minlength=10) == pytest.approx(10_000, rel=0.05)
    first = draws(3, 0, np.arange(4), 8)
    assert len({row.tobytes() for row in first}) == 4
    for seed, stream in ((4, 0), (3, 1), (3 + (1 << 40), 0)):
        assert not np.array_equal(draws(seed, stream, np.arange(4), 8), first)


@pytest.mark.parametrize(("task", "length"), CASES, ids=str)
def test_a_sample_is_a_pure_function_of_seed_split_and_number(task: Task, length: int) -> None:
    task.check(length)
    tokens, labels = task.make(length, 5, 0, NUMBERS)
    assert tokens.shape == labels.shape == (300, length)
    assert tokens.min() >= 0
    assert max(tokens.max(), labels.max()) < task.vocabulary_size
    assert labels.min() >= -1
    # In any order and any parts.
    some = np.array([250, 3, 77])
    again = task.make(length, 5, 0, some)
    assert np.array_equal(again[0], tokens[some])
    assert np.array_equal(again[1], labels[some])
    for seed, stream in ((6, 0), (5, 1)):
        assert not np.array_equal(task.make(length, seed, stream, NUMBERS)[0], tokens)


def test_the_samples_stay_the_same_for_ever() -> None:
    """Frozen, so that a seed means the same data in every version and on every machine."""
    tokens, labels = Mqar(vocab=16, pairs=3, queries=3).make(14, 0, 0, np.arange(1))
    assert (tokens[0].tolist(), labels[0].tolist()) == FROZEN["mqar"]
    tokens, labels = StateTracking("s3").make(8, 0, 0, np.arange(1))
    assert (tokens[0].tolist(), labels[0].tolist()) == FROZEN["state_tracking"]
    tokens, _ = Copy(vocab=9).make(10, 0, 0, np.arange(1))
    assert tokens[0].tolist() == FROZEN["copy"][0]
    tokens, _ = Passkey().make(250, 0, 0, np.arange(1))
    assert bytes(tokens[0].astype(np.uint8))[-5:].decode() == FROZEN["passkey"]


FROZEN: dict = {
    "mqar": (
        [3, 12, 7, 15, 5, 10, 3, 0, 5, 0, 0, 0, 7, 0],
        [-1, -1, -1, -1, -1, -1, 12, -1, 10, -1, -1, -1, 15, -1],
    ),
    "state_tracking": ([2, 5, 4, 3, 5, 2, 4, 0], [2, 3, 0, 3, 2, 0, 4, 4]),
    "copy": ([3, 7, 5, 4, 7, 8, 3, 7, 5, 4],),
    "passkey": "87693",
}


def test_mqar_asks_each_key_once_for_its_value() -> None:
    task = Mqar(vocab=64, pairs=6, queries=4)
    tokens, labels = task.make(41, 0, 0, NUMBERS)
    for row, answers in zip(tokens, labels, strict=True):
        told = dict(zip(row[:12:2], row[1:12:2], strict=True))
        assert len(told) == 6
        assert all(1 <= key < 32 <= value < 64 for key, value in told.items())
        asked = np.flatnonzero(answers >= 0)
        assert len({row[at] for at in asked}) == len(asked) == 4
        assert all(at >= 12 and at % 2 == 0 and answers[at] == told[row[at]] for at in asked)
        rest = np.setdiff1d(np.arange(12, 41), asked)
        assert not row[rest].any()


def test_mqar_draws_distances_from_a_power_law() -> None:
    """power 1 is even; 0.01 asks near the pairs more often."""
    spread = {}
    for power in (1.0, 0.01):
        _, labels = Mqar(vocab=64, pairs=4, queries=1, power=power).make(208, 0, 0, np.arange(3000))
        spread[power] = np.mean(np.nonzero(labels >= 0)[1] - 8)
    assert spread[1.0] == pytest.approx(99, rel=0.05)
    # Mean of 2 x weighted by 1 / (x + 1), x < 100: (100 - H(100)) / H(100) = 18.3.
    assert spread[0.01] == pytest.approx(37.3, rel=0.08)


def test_passkey_is_told_once_and_asked_at_the_end() -> None:
    for length in (Passkey().shortest, 300, 1000):
        tokens, labels = Passkey().make(length, 0, 0, np.arange(50))
        depths = set()
        for row, answers in zip(tokens, labels, strict=True):
            text = bytes(row.astype(np.uint8)).decode()
            opening, rest = text.split("The number is ", 1)
            key = rest[:5]
            assert key.isdigit()
            assert text.endswith(f"Which number was told? The number is {key}")
            assert text.count(key) == 2
            assert text.count("The number is ") == 2
            asked = np.flatnonzero(answers >= 0)
            assert asked.tolist() == list(range(length - 6, length - 1))
            assert "".join(chr(answer) for answer in answers[asked]) == key
            # Each answer is the byte that comes next.
            assert np.array_equal(answers[asked], row[asked + 1])
            depths.add(len(opening))
        assert len(depths) == 1 if length == Passkey().shortest else len(depths) > 20


def test_copy_repeats_the_letters_after_the_mark() -> None:
    tokens, labels = Copy(vocab=9).make(30, 0, 0, NUMBERS)
    assert (tokens[:, 15] == 8).all()
    assert (tokens[:, :15] < 8).all()
    assert np.array_equal(tokens[:, 16:], tokens[:, :14])
    assert np.array_equal(labels[:, 15:], tokens[:, :15])
    assert (labels[:, :15] == -1).all()


@pytest.mark.parametrize(("group", "order"), [("parity", 2), ("s3", 6), ("a5", 60), ("s5", 120)])
def test_state_tracking_labels_are_running_products(group: str, order: int) -> None:
    table = table_of(group)
    assert table.shape == (order, order)
    # A group: the identity is element 0, and every row and column holds every element.
    assert np.array_equal(table[0], np.arange(order))
    assert np.array_equal(table[:, 0], np.arange(order))
    assert np.array_equal(np.sort(table, axis=1), np.tile(np.arange(order), (order, 1)))
    left, right = (
        table[table[:, :, None], np.arange(order)],
        table[np.arange(order)[:, None, None], table],
    )
    assert np.array_equal(left, right)
    commutes = np.array_equal(table, table.T)
    assert commutes == (group == "parity")
    tokens, labels = StateTracking(group).make(37, 1, 0, np.arange(20))
    for row, answers in zip(tokens, labels, strict=True):
        state = 0
        for element, answer in zip(row, answers, strict=True):
            state = table[state, element]
            assert answer == state
    if group == "parity":
        assert np.array_equal(labels, tokens.cumsum(1) % 2)


@pytest.mark.parametrize(
    ("name", "options", "length", "said"),
    [
        ("recall", {}, 64, "mqar, passkey, copy, state_tracking"),
        ("copy", {"pairs": 3}, 64, "it has vocab"),
        ("mqar", {"pairs": 40, "queries": 2, "vocab": 64}, 200, "40 pairs, and 31 keys"),
        ("mqar", {"pairs": 8, "queries": 9}, 200, "9 queries, 8 pairs"),
        ("mqar", {"pairs": 8}, 30, "(length 30 - 2 x 8) / 2 = 7 places"),
        ("mqar", {"power": 0.0}, 64, "power in (0, 1]"),
        ("passkey", {}, 100, "--length is 100"),
        ("copy", {}, 31, "even length"),
        ("state_tracking", {"group": "s4"}, 8, "parity, s3, a5, s5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    name: str, options: dict, length: int, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        task_of(name, options).check(length)
    assert said in str(caught.value)
    assert set(TASKS) == {"mqar", "passkey", "copy", "state_tracking"}
