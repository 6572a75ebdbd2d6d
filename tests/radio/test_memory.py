"""What circles hold is freed, and no interruption is lost meanwhile."""

from __future__ import annotations

import gc
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from radio.resources import collect


class Circle:
    """Holds itself; an interruption comes while it is freed."""

    def __init__(self, *, interrupts: bool) -> None:
        self.me, self.interrupts = self, interrupts

    def __del__(self) -> None:
        if self.interrupts:
            signal.raise_signal(signal.SIGINT)


def test_an_interruption_in_a_finalizer_comes_afterwards() -> None:
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    gc.disable()
    try:
        Circle(interrupts=True)
        with pytest.raises(KeyboardInterrupt):
            collect()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, outside)
    collect()  # once


def test_any_thread_may_ask_for_it() -> None:
    circle = Circle(interrupts=False)
    held = weakref.ref(circle)
    del circle
    with ThreadPoolExecutor(1) as threads:
        threads.submit(collect).result()
    assert held() is None
