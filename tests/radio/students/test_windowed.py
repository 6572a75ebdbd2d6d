"""Which blocks are global."""

from __future__ import annotations

import pytest

from radio.errors import ConfigError
from radio.students.vit import global_blocks


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [
        *[(32, (7, 15, 23, 31)), (24, (5, 11, 17, 23)), (12, (2, 5, 8, 11)), (8, (1, 3, 5, 7))],
        *[(40, (9, 19, 29, 39)), (27, (5, 11, 17, 23, 26)), (30, (6, 13, 20, 27, 29))],
    ],
)
def test_quarters_end_in_a_global_block(depth, wanted):
    assert global_blocks(depth) == wanted


@pytest.mark.parametrize(
    ("depth", "wanted"), [(32, (5, 11, 17, 23, 29, 31)), (12, (5, 11)), (7, (5, 6)), (4, (3,)), (1, (0,))]
)
def test_runs_of_five_end_in_a_global_block_and_so_does_the_network(depth, wanted):
    assert global_blocks(depth, "runs-of-5") == wanted


@pytest.mark.parametrize(
    ("depth", "parts", "wanted"),
    [
        (12, 4, (2, 5, 8, 11)),
        (12, 1, (11,)),
        (12, 5, (1, 3, 5, 7, 9, 11)),
        (24, 6, (3, 7, 11, 15, 19, 23)),
        (27, 3, (8, 17, 26)),
        (27, 4, (5, 11, 17, 23, 26)),
        (32, 8, (3, 7, 11, 15, 19, 23, 27, 31)),
        (40, 4, (9, 19, 29, 39)),
        (40, 3, (12, 25, 38, 39)),
    ],
)
def test_a_number_of_parts_each_ends_in_a_global_block(depth, parts, wanted):
    assert global_blocks(depth, parts) == wanted


@pytest.mark.parametrize(
    ("depth", "schedule"), [(1, "quarters"), (4, "quarters"), (6, 4), (27, 14), (12, 0), (12, -2)]
)
def test_parts_of_fewer_than_two_blocks_are_an_error(depth, schedule):
    parts = 4 if schedule == "quarters" else schedule
    with pytest.raises(ConfigError, match=f"a depth of {depth} does not have {parts} parts .* runs-of-5"):
        global_blocks(depth, schedule)
