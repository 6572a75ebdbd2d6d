"""The settings of the tasks that score a run's models: in its file, and as options of its command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from evals.core import evaluators
from evals.core.task import make_evaluator, missing_data, name_job, settings_on
from radio.config import ReadWith, from_plain
from radio.datasets import read_data_sets
from radio.errors import ConfigError, shown
from radio.io import brief

if TYPE_CHECKING:
    from .config import TrainConfig

Tasks: TypeAlias = Mapping[str, Any]
"""Settings by the task's name."""


def read_tasks(data: Any, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the settings of tasks, each as its evaluator's own; `settings` are the run's, not looked at.

    Raises:
        ConfigError: an unknown task, or as `from_plain`.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: wanted a mapping of tasks to their settings, got {brief(data)}")
    tasks = {}
    for name, plain in data.items():
        if not isinstance(name, str):
            raise ConfigError(f"{where}: {brief(name)} is not the name of a task; give a name such as knn")
        try:
            kind = settings_type(name)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        tasks[name] = from_plain(kind, plain, f"{where}.{name}")
    return tasks


TasksField = Annotated[Tasks, ReadWith(read_tasks), tyro.conf.Fixed, tyro.conf.Suppress]
"""The type of a field of tasks; on the command line each task has options of its own instead."""


def settings_type(task: str) -> type[Any]:
    """Return the dataclass of a task's settings.

    Raises:
        ConfigError: the task is unknown, or the evaluator of another package is none.
    """
    return make_evaluator(task).settings


def find_tasks(prefix: str) -> list[str]:
    """Find the tasks whose options have a prefix on the command line; `-` and `_` are the same there."""
    return [task for task in evaluators if task.replace("_", "-") == prefix.replace("_", "-")]


def scored_tasks(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the tasks that a run scores, at its end or on the way."""
    return tuple(dict.fromkeys((*config.score, *(config.eval_tasks if config.eval_every else ()))))


def task_settings(config: TrainConfig, tasks: Iterable[str]) -> dict[str, Any]:
    """Return the settings of tasks by name: those of the run, or else the evaluator's defaults.

    Raises:
        ConfigError: a task is unknown, or requires settings that the run does not give.
    """
    return {task: config.tasks[task] if task in config.tasks else _defaults(task) for task in tasks}


def scored_jobs(config: TrainConfig, tasks: Iterable[str]) -> dict[str, Any]:
    """Return the settings that tasks are scored with: on the data sets of the run's data root, if it has one.

    Returns:
        settings by the task's name, or by `name_job` on a data set.

    Raises:
        ConfigError: as `task_settings`, or a data root without a data set that a task is scored on.
    """
    jobs: dict[str, Any] = {}
    for task, settings in task_settings(config, tasks).items():
        if config.data_root is None:
            jobs[task] = settings
            continue
        evaluator = make_evaluator(task)
        placed = settings_on(evaluator, settings, read_data_sets(config.data_root))
        if not placed:
            raise ConfigError(f"{task}: {missing_data(evaluator, settings, config.data_root)}")
        jobs |= {name_job(task, data_set): each for data_set, each in placed.items()}
    return jobs


def check_data(config: TrainConfig) -> None:
    """Check that the paths exist by which the scored tasks' settings, or a data root, name data.

    Raises:
        ConfigError: one does not; or as `scored_jobs`.
    """
    check_paths(scored_jobs(config, scored_tasks(config)), config)


def check_paths(jobs: Mapping[str, Any], config: TrainConfig) -> None:
    """Check that the paths exist by which settings of evaluations name data.

    Args:
        jobs: settings by the evaluation's name.
        config: of the run, for the message.

    Raises:
        ConfigError: one does not.
    """
    from evals.core.evaluator import machine_settings  # needs torch, which command lines do not wait for

    for job, settings in jobs.items():
        where_saved = machine_settings(settings)  # no data: a score would depend on them
        values = {field.name: getattr(settings, field.name) for field in fields(settings)}
        for path in _paths([value for name, value in values.items() if name not in where_saved]):
            if not path.exists():
                root = "" if config.data_root is None else f" or {shown(str(config.data_root))}"
                raise ConfigError(
                    f"{job}: {shown(str(path))}: no such file or folder; mend the task's settings{root}, or "
                    f"leave it out of --score and --eval-tasks"
                )


def _paths(value: Any) -> Iterator[Path]:
    """Iterate over the paths among settings, and texts that can be nothing else; patterns are left out."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, str) and value.startswith("/") and not set("{*") & set(value):
        yield Path(value)
    elif isinstance(value, Mapping):
        yield from _paths(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _paths(each)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _paths([getattr(value, field.name) for field in fields(value)])


def required_settings(task: str) -> list[str]:
    """Return the settings of a task that have no default.

    Raises:
        ConfigError: as `settings_type`.
    """
    return [
        field.name
        for field in fields(settings_type(task))
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]


def _defaults(task: str) -> Any:
    if required := required_settings(task):
        options = ", ".join(f"--{task}.{name}".replace("_", "-") for name in required)
        raise ConfigError(
            f"{task} has no default for all of its settings: give {options}, or leave it out of --score and "
            f"--eval-tasks"
        )
    return settings_type(task)()
