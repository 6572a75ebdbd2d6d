"""The memory available to a rank, and garbage collection that is safe against Ctrl-C."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import torch

from .errors import SizeError
from .types import Backbone

_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # limit of a container or a job


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or each local rank's share of the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, _allowed(whole)) // _local_ranks()


def collect() -> None:
    """Run the garbage collector; defer an interruption (Ctrl-C) until it is done.

    Python would raise it in the running finalizer, where errors are printed and dropped.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        gc.collect()  # only the main thread receives signals
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


_LEAST_PATCH = 8  # pixels, for a backbone that accepts any size


def check_memory(
    model: Backbone, batch: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Check that the images of a batch and their tokens fit into memory; activations are not counted.

    Raises:
        SizeError: they do not; the message has the sizes.
    """
    height, width = size
    patch = max(model.patch_size, _LEAST_PATCH)
    rows, columns = max(height // patch, 1), max(width // patch, 1)
    need = batch * dtype.itemsize * (3 * height * width + rows * columns * model.token_dim)
    there = memory_of(device)
    if need > there:
        raise SizeError(
            f"{batch} images of {height}x{width} px and their tokens take {need / 1e9:,.1f} GB, and {device} "
            f"has {there / 1e9:,.1f}; make the images or the batch smaller"
        )
