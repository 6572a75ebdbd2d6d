"""Lazy imports of transformers and peft, with logging reduced to errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from radio.errors import require


def load_library() -> ModuleType:
    """Import the module `transformers`, and limit its logging to errors.

    Raises:
        MissingExtraError: the extra `vqa` is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads conflict with our loaders' forks
    transformers = require("transformers", extra="vqa")
    require("accelerate", extra="vqa")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def require_peft() -> ModuleType:
    """Import the module `peft`, for LoRA.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("peft", extra="vqa")


_SMALL = 5_000_000  # weights


@contextmanager
def fitting_threads(model: Any, device: torch.device) -> Iterator[None]:
    """Use one thread inside for a small language model on the CPU; leave the number unchanged for others.

    Its operations are so short that several threads wait for each other: on cores shared with other programs
    a step took 2.9 s on two threads and 0.17 s on one.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
