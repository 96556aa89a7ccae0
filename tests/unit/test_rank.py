"""The launcher's variables: what they mean, and contradictions."""

from __future__ import annotations

import pytest

from xdist.errors import LaunchError
from xdist.rank import RankVariables, read_rank

FULL = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}


def test_no_variables_is_one_rank() -> None:
    assert read_rank({}) == RankVariables(0, 1, 0, 1)
    assert read_rank({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


def test_torchrun_variables() -> None:
    said = read_rank({**FULL, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    assert said == RankVariables(1, 2, 0, 1, "a", 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "one"}, "not an integer"),
        ({"RANK": ""}, "needed together"),
        ({"WORLD_SIZE": ""}, "needed together"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
        ({"MASTER_PORT": ""}, "without MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, "not a port"),
    ],
)
def test_contradictions_show_what_was_seen(change: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        read_rank({**FULL, **change})
    assert caught.value.exit_code == 3
    assert "variables seen: " in caught.value.why
