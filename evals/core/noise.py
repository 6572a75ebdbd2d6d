"""Seed variance of scores: the same model and data with different random numbers."""

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
from radio.progress import ProgressFactory
from radio.types import Backbone

from .evaluator import Evaluator, run_one

FORMAT = "am-radio-noise/1"
NOISE_FILE = "noise.json"

_APART = 1.959964 * 2**0.5  # in standard deviations: 5 % of pairs of runs differ by more

Noise = dict[str, dict[str, float]]
"""By task and metric: the difference that 95 % of pairs of runs do not exceed."""


class _File(TypedDict):
    """Content of a noise file."""

    format: Literal["am-radio-noise/1"]
    tasks: dict[str, dict[str, Annotated[float, Field(ge=0, le=1e100)]]]


_FILE = TypeAdapter(_File)


@runtime_checkable
class Repeatable(Protocol):
    """An evaluator that trains something, and so has seed variance."""

    def with_seed(self, settings: Any, number: int) -> Any:
        """Return the settings of the same measurement with the random numbers of repetition `number`."""


def measure_noise(
    model: Backbone,
    jobs: Mapping[str, tuple[Evaluator[Any], Any]],
    *,
    repeats: int,
    name: str,
    watch: ProgressFactory,
    tell: Callable[[str], None],
) -> Noise:
    """Measure the noise of every metric of the repeatable tasks; deterministic ones have no entry.

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
                again = evaluator.with_seed(settings, number)
                report = run_one(evaluator, model, again, Path(folder), name=name, watch=watch)
                for metric, value in report.metrics.items():
                    values.setdefault(metric, []).append(value.value)
        found[task] = {
            metric: float(_APART * np.std(seen, ddof=1)) for metric, seen in values.items() if len(seen) > 1
        }
    return found


def write_noise(path: Path, noise: Noise, *, fingerprint: str, repeats: int) -> None:
    """Write the noise as JSON, atomically."""
    data = {"format": FORMAT, "fingerprint": fingerprint, "repeats": repeats, "tasks": noise}
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_noise(path: Path) -> Noise:
    """Read the noise in a file.

    Raises:
        DataError: the file does not exist, or was not written by `radio-eval noise`.
    """
    try:
        return read_json(path, _FILE)["tasks"]
    except DataError as error:
        raise DataError(f"no file of noise; radio-eval noise MODEL writes one ({error})") from error
