"""A run that ends in the middle of something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from train import trainer as module
from train.distributed import DistributedStudent
from train.trainer import Trainer


class StoppedError(Exception):
    """What a kill is here."""


def run_until(run: Trainer, name: str, call: int) -> None:
    """Train until the trainer calls its function of this name for the n-th time."""
    owner = module if hasattr(module, name) else DistributedStudent
    genuine: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, 1000))

    def stopping(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise StoppedError
        return genuine(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(StoppedError):
            run.train()
