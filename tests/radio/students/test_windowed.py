"""Which blocks are global."""

from __future__ import annotations

import pytest

from radio.errors import ConfigError
from radio.students.windowed import global_blocks


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [(32, (7, 15, 23, 31)), (24, (5, 11, 17, 23)), (12, (2, 5, 8, 11)), (8, (1, 3, 5, 7))],
)
def test_quarters_end_in_a_global_block(depth, wanted):
    assert global_blocks(depth) == wanted


@pytest.mark.parametrize(
    ("depth", "wanted"), [(32, (5, 11, 17, 23, 29, 31)), (12, (5, 11)), (7, (5, 6)), (4, (3,)), (1, (0,))]
)
def test_runs_of_five_end_in_a_global_block_and_so_does_the_network(depth, wanted):
    assert global_blocks(depth, "runs-of-5") == wanted


@pytest.mark.parametrize("depth", [1, 4, 6, 30])
def test_a_depth_without_quarters_of_two_blocks_is_an_error(depth):
    with pytest.raises(ConfigError, match=f"a depth of {depth} has no four quarters .* runs-of-5"):
        global_blocks(depth)
