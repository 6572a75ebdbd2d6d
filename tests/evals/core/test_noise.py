from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.core.evaluator import EvalRun, Evaluator, Result, RunSettings
from evals.core.report import Metric
from evals.core.suite import measure_noise, read_noise, write_noise
from radio.errors import ConfigError, DataError
from radio.progress import no_progress

LUCK = (50.0, 52.0, 51.0, 53.0)


@dataclass(frozen=True)
class Settings:
    """What luck is."""

    luck: int = 7


def never(model: Any, settings: Settings, run: EvalRun) -> Result:
    raise AssertionError("nobody needs to run it")


def train(model: Any, settings: Settings, run: EvalRun) -> Result:
    return Result(metrics={"miou": Metric(value=LUCK[settings.luck]), "same": Metric(value=1.0)})


EXACT = Evaluator(name="exact", settings=Settings, evaluate=never)
TRAINED = Evaluator(
    name="trained",
    settings=Settings,
    evaluate=train,
    with_seed=lambda settings, run, number: replace(settings, luck=number),
)


def measured(model: Any, repeats: int) -> dict[str, dict[str, float]]:
    jobs: Any = {"exact": (EXACT, Settings()), "trained": (TRAINED, Settings())}
    return measure_noise(
        model,
        jobs,
        run=RunSettings(),
        repeats=repeats,
        name="m",
        progress=no_progress,
        log=lambda line: None,
    )


def test_a_task_on_several_sets_has_the_largest_noise_of_each_metric(backbone: Callable[..., Any]) -> None:
    """`compare` looks it up by the task's name, whatever the data set."""
    wider = replace(
        TRAINED,
        evaluate=lambda model, settings, run: Result(
            metrics={"miou": Metric(value=2 * LUCK[settings.luck]), "same": Metric(value=1.0)}
        ),
    )
    jobs: Any = {
        "trained on ade20k": (TRAINED, Settings()),
        "trained on voc": (wider, Settings()),
        "trained on coco": (TRAINED, Settings()),
    }
    both = measure_noise(
        backbone(), jobs, run=RunSettings(), repeats=4, name="m", progress=no_progress, log=lambda line: None
    )
    alone = measured(backbone(), 4)["trained"]
    assert both == {"trained": {"miou": pytest.approx(2 * alone["miou"]), "same": 0}}


def test_noise_is_what_two_runs_differ_by(backbone: Callable[..., Any]) -> None:
    """Checked by drawing pairs: 95 % of the differences of two normal numbers of that spread are smaller."""
    found = measured(backbone(), 4)
    assert list(found) == ["trained"] and found["trained"]["same"] == 0
    spread = np.std(LUCK, ddof=1)
    pairs = np.random.default_rng(0).normal(0, spread, (200_000, 2))
    inside = np.mean(np.abs(pairs[:, 0] - pairs[:, 1]) < found["trained"]["miou"])
    assert inside == pytest.approx(0.95, abs=0.003)


def test_one_run_has_no_spread(backbone: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="--repeats 1: a spread needs two or more"):
        measured(backbone(), 1)


def test_a_file_of_noise_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "noise.json"
    write_noise(path, {"seg": {"miou": 0.5}}, fingerprint="f", repeats=3)
    assert read_noise(path) == {"seg": {"miou": 0.5}}
    made = '{"format": "am-radio-noise/1", "tasks": {"seg": {"miou": %s}}}'
    poison = [made % value for value in ("NaN", "-1", "1e999", "true", '"1"', "[" * 100_000, "1" * 5000)]
    for text in (
        *poison,
        "{",
        '{"format": "am-radio-noise/0"}',
        '{"format": "am-radio-noise/1", "tasks": {"a": 1}}',
    ):
        path.write_text(text)
        with pytest.raises(DataError, match="file of noise"):
            read_noise(path)
    with pytest.raises(DataError, match="radio-eval noise MODEL writes one"):
        read_noise(tmp_path / "gone.json")
