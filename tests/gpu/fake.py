"""A second GPU on a machine without any: tensors that have shapes and a device, and no values.

A module built for `GPU` under `pretend` raises where tensors of two devices meet, and where the host would
wait for the device (`.item()`, `.tolist()`, a boolean mask as index, `.numpy()`). What it cannot see are
copies (from pageable memory, blocking ones, `.cpu()` itself, those inside native code) and all of a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

GPU = torch.device("cuda:1")

T = TypeVar("T")


@contextmanager
def pretend() -> Iterator[None]:
    """Let tensors be made on `GPU`, and forwards be run there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(build: Callable[[], T]) -> T:
    """Build a module whose registered tensors are on `GPU`; called inside `pretend`."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = build()
    assert isinstance(module, nn.Module)
    return module.to_empty(device=GPU)
