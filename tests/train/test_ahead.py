"""What is made ahead comes in order, one item early, and fails where it would have come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from train.data.loader import limit_threads, prefetch


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
    for number in prefetch(items()):
        if number == 0:
            assert second.wait(10), "the second item is made while the first is used"
        used.append(number)
    assert used == made == [0, 1, 2]


def test_an_empty_iterator_gives_nothing() -> None:
    assert list(prefetch(iter(()))) == []


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_an_item_that_is_false_or_none_does_not_end_the_stream() -> None:
    assert list(prefetch(iter([None, 0, ""]))) == [None, 0, ""]


class FakeStream:
    """What `ahead` asks of a CUDA stream, written down in the order of the calls."""

    def __init__(self, told: list[str], name: str) -> None:
        self.told, self.name = told, name

    def wait_stream(self, other: FakeStream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.told.append(f"{self.name} is ready")
        return f"an event of {self.name}"


def test_on_a_gpu_the_thread_has_its_device_and_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    main, side = FakeStream(told, "main"), FakeStream(told, "side")
    current = threading.local()

    @contextmanager
    def chosen(stream: FakeStream) -> Iterator[None]:
        current.stream = stream
        yield
        current.stream = None

    def set_device(device: torch.device) -> None:
        current.device = device

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", chosen)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)

    def items() -> Iterator[int]:
        for number in range(2):
            assert current.device == torch.device("cuda:1"), "a new thread is on cuda:0"
            assert current.stream is side
            yield number

    stream = prefetch(items(), torch.device("cuda:1"))
    assert next(stream) == 0
    assert told[:2] == ["side waits for main", "side is ready"]
    assert "main waits for an event of side" in told  # before the caller has the item
    assert list(stream) == [1]
    assert told.count("main waits for an event of side") == 2
    assert not hasattr(current, "device"), "the caller's thread is left alone"


def test_half_the_threads_also_holds_in_the_other_thread_and_is_undone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with limit_threads():
            assert torch.get_num_threads() == 2
            (elsewhere,) = prefetch(torch.get_num_threads() for _ in range(1))
            assert elsewhere == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
