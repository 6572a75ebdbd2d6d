"""How much a score moves when nothing but luck changes: the same model and data, other random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from radio.errors import ConfigError, DataError
from radio.io import read_json, write_text
from radio.types import Backbone

from .evaluator import Evaluator, Watch, run_one

FORMAT = "am-radio-noise/1"
NOISE_FILE = "noise.json"

_APART = 1.959964 * 2**0.5  # two runs differ by more standard deviations than this once in twenty times

Noise = dict[str, dict[str, float]]
"""By task and metric: what two runs differ by at most, 19 times of 20."""


class _File(TypedDict):
    """The content of a file of noise."""

    format: Literal["am-radio-noise/1"]
    tasks: dict[str, dict[str, Annotated[float, Field(ge=0, le=1e100)]]]


_FILE = TypeAdapter(_File)


@runtime_checkable
class Repeatable(Protocol):
    """An evaluator that trains something, and so has luck."""

    def repeat(self, settings: Any, number: int) -> Any:
        """The settings of the same measurement with other random numbers."""


def measure_noise(
    model: Backbone,
    jobs: Mapping[str, tuple[Evaluator[Any], Any]],
    *,
    repeats: int,
    name: str,
    watch: Watch,
    tell: Callable[[str], None],
) -> Noise:
    """The noise of every metric of the tasks that have luck; those without are exact and have no entry.

    Raises:
        ConfigError: fewer than two repeats.
    """
    if repeats < 2:
        raise ConfigError(f"--repeats {repeats}: a spread needs two or more")
    found: Noise = {}
    for task, (evaluator, settings) in jobs.items():
        if not isinstance(evaluator, Repeatable):
            tell(f"{task}: exact")
            continue
        values: dict[str, list[float]] = {}
        with TemporaryDirectory(prefix="am-radio-noise-") as folder:
            for number in range(repeats):
                tell(f"{task}: run {number + 1} of {repeats}")
                again = evaluator.repeat(settings, number)
                report = run_one(evaluator, model, again, Path(folder), name=name, watch=watch)
                for metric, value in report.metrics.items():
                    values.setdefault(metric, []).append(value.value)
        found[task] = {
            metric: float(_APART * np.std(seen, ddof=1)) for metric, seen in values.items() if len(seen) > 1
        }
    return found


def write_noise(path: Path, noise: Noise, *, fingerprint: str, repeats: int) -> None:
    """Write it as JSON, atomically."""
    data = {"format": FORMAT, "fingerprint": fingerprint, "repeats": repeats, "tasks": noise}
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_noise(path: Path) -> Noise:
    """The noise in a file.

    Raises:
        DataError: no such file, or not one that `radio-eval noise` wrote.
    """
    try:
        return read_json(path, _FILE)["tasks"]
    except DataError as error:
        raise DataError(f"no file of noise; radio-eval noise MODEL writes one ({error})") from error
