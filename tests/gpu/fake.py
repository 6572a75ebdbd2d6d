"""A second GPU on a machine without any: tensors that have shapes and a device, and no values.

A module built for `GPU` under `pretend` raises where tensors of two devices meet, and where the host would
wait for the device (`.item()`, `.tolist()`, a boolean mask as index, `.numpy()`, an index on the CPU). What
it cannot see are other copies (from pageable memory, blocking ones, `.cpu()`, those in native code) and
all of a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

GPU = torch.device("cuda:1")

T = TypeVar("T")

# If a process's first backward is on fake tensors, processes forked from it cannot run a backward.
torch.ones((), requires_grad=True).exp().backward()


class Fake(FakeTensorMode):
    """Torch's own mode, which lets an index on the CPU pass: a GPU gets a copy of it, and the host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator without values."""
        if func is torch.ops.aten.index.Tensor and args[0].device == GPU:
            assert all(index is None or index.device == GPU for index in args[1]), "an index on the CPU"
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@contextmanager
def pretend() -> Iterator[None]:
    """Let tensors be made on `GPU`, and forwards be run there."""
    with Fake(allow_non_fake_inputs=True):
        yield


def on_gpu(build: Callable[[], T]) -> T:
    """Build a module whose registered tensors are on `GPU`; called inside `pretend`."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = build()
    assert isinstance(module, nn.Module)
    return module.to_empty(device=GPU)
