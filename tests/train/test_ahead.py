"""What is made ahead comes in order, one item early, and fails where it would have come."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from train.ahead import ahead, half_the_threads


def test_items_come_in_order_and_each_is_made_while_the_one_before_is_used() -> None:
    made: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    used = []
    for number in ahead(items()):
        if number == 0:
            assert second.wait(10), "the second item is made while the first is used"
        used.append(number)
    assert used == made == [0, 1, 2]


def test_an_empty_iterator_gives_nothing() -> None:
    assert list(ahead(iter(()))) == []


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    stream = ahead(items())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_an_item_that_is_false_or_none_does_not_end_the_stream() -> None:
    assert list(ahead(iter([None, 0, ""]))) == [None, 0, ""]


def test_half_the_threads_also_holds_in_the_other_thread_and_is_undone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with half_the_threads():
            assert torch.get_num_threads() == 2
            (elsewhere,) = ahead(torch.get_num_threads() for _ in range(1))
            assert elsewhere == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
