"""The settings of the tasks that score a run's models: in its file, and as options of its command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from evals.core import evaluators
from evals.core.task import make_evaluator
from radio.config import ReadWith, from_plain
from radio.errors import ConfigError
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


def _defaults(task: str) -> Any:
    kind = settings_type(task)
    required = [
        field.name
        for field in fields(kind)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]
    if required:
        options = ", ".join(f"--{task}.{name}".replace("_", "-") for name in required)
        raise ConfigError(
            f"{task} has no default for all of its settings: give {options}, or leave it out of --score and "
            f"--eval-tasks"
        )
    return kind()
