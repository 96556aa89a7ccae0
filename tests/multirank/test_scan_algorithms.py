"""The scan move in its three algorithms on 1, 2, 3 and 4 ranks, forward and backward.

For every case: entering states and gradients against a dense fold in float64, and ledger = formula
= bytes seen by a dispatch mode.
"""

from __future__ import annotations

from pathlib import Path

from tests.multirank import scan_cases as cases
from xdist.testing import RankPool


def test_one_rank() -> None:
    assert cases.grid(1)
    assert cases.odd(1)


def test_two_ranks(pool2: RankPool) -> None:
    assert pool2.run(cases.grid, 2) == [True] * 2


def test_three_ranks(pool3: RankPool) -> None:
    assert pool3.run(cases.grid, 3) == [True] * 3


def test_four_ranks(pool4: RankPool) -> None:
    assert pool4.run(cases.grid, 4) == [True] * 4


def test_odd_layouts(pool2: RankPool, pool4: RankPool) -> None:
    """More segments a rank than ranks, one token each, ranks without tokens, no tokens at all."""
    assert pool2.run(cases.odd, 2) == [True] * 2
    assert pool4.run(cases.odd, 4) == [True] * 4


def test_any_number_of_blocks(pool3: RankPool) -> None:
    assert pool3.run(cases.any_number_of_blocks, 3) == [True] * 3


def test_both_directions_in_one_exchange(pool2: RankPool, pool3: RankPool) -> None:
    assert cases.two_directions(1)
    assert pool2.run(cases.two_directions, 2) == [True] * 2
    assert pool3.run(cases.two_directions, 3) == [True] * 3


def test_with_rates_one_log_number_a_state_travels(pool3: RankPool) -> None:
    assert cases.one_log_number_a_state(1)
    assert pool3.run(cases.one_log_number_a_state, 3) == [True] * 3


def test_a_recompute_repeats_no_message_of_a_chain(pool3: RankPool) -> None:
    assert pool3.run(cases.kept_and_replayed, 3) == [True] * 3


def test_the_exchange_is_in_flight_during_local_work(pool2: RankPool, tmp_path: Path) -> None:
    """Record order start, local work, wait; the peer sends only after this rank's local work."""
    order = ["start", "local work", "wait"]
    for seen in pool2.run(cases.local_work_in_between, str(tmp_path)):
        assert seen == [(name, order, True) for name in ("gather", "chain", "pipelined")]


def test_a_move_in_the_middle_of_a_chain_is_refused(pool3: RankPool) -> None:
    before, told, after = pool3.run(cases.moves_in_between)
    assert (before, after) == ("", "")
    assert "reduce was started on a group on which a scan's chain is under way" in told


def test_auto_moves_what_it_says(pool4: RankPool) -> None:
    assert pool4.run(cases.auto_moves_what_it_says, 4) == [["gather", "pipelined"]] * 4


def test_bad_input_is_refused_with_its_numbers(pool2: RankPool) -> None:
    for told in pool2.run(cases.refused):
        layout, rates, columns, number, together = told
        assert layout.startswith("ShapeError")
        assert "3 and 2" in layout
        assert "'scalar'" in rates
        assert columns.startswith("StrategyError")
        assert "1 segments, 2 tensors" in number
        assert "torch.float32" in together
        assert "torch.float64" in together
