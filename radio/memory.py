"""How much memory a rank can have, and how it gets back what circles hold."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import torch

_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # of a container or a job


def memory_of(device: torch.device) -> int:
    """Give the bytes of a GPU, or of the machine or its container for each of the ranks on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, _allowed(whole)) // _local_ranks()


def collect() -> None:
    """Free what is held in circles alone. An interruption (Ctrl-C) meanwhile comes afterwards.

    Python would raise it in whatever finalizer runs, where errors are printed and dropped.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        gc.collect()  # signals are another thread's
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        gc.collect()
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _allowed(whole: int) -> int:
    try:
        text = _CONTROL_GROUP.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return whole
    return int(text) if text.isdecimal() else whole


def _local_ranks() -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(text), 1) if text.isdecimal() else 1
