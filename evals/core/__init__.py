"""The frame of all evaluators, and their registry, which needs no torch: listings do not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from radio.registry import Registry

if TYPE_CHECKING:
    from .task import Evaluator

_OURS = (
    *("correspondence", "dense_knn", "depth", "fidelity", "fixed_pattern", "knn", "linear", "maps"),
    *("open_vocab", "resolution", "retrieval", "sam_dropin", "seg_probe", "throughput"),
    *("vqa", "zeroshot"),
)

evaluators: Registry[Callable[[], Evaluator[Any]]] = Registry(
    "evaluator", lazy=True, modules=[f"evals.{package}" for package in _OURS]
)
"""Factories without arguments, by the task's name. Plug-ins use the entry-point group `am_radio.evaluators`;
the first line of a factory's docstring is what `radio-eval list` prints."""
