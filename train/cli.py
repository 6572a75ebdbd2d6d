"""radio-train: a recipe or a saved config.yaml, options over it, one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console

from evals.core.provenance import choose_device
from radio.config import read_yaml
from radio.errors import ConfigError

from .comparison import compares, runs_of
from .config import TrainConfig
from .parallel import join
from .recipes import recipes
from .teachers_from_scenes import TeachersConfig
from .teachers_from_scenes import main as train_teachers
from .trainer import Run

USAGE = """usage: radio-train RECIPE [--section.option value ...] [--restart]
       radio-train runs/NAME/config.yaml [--out runs/OTHER] ...

One run of distillation. Repeat the command to go on where it was stopped.
`radio-train RECIPE --help` lists every option with the recipe's value. Recipes:
"""
TEACHERS = "scenes-teachers"

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """Options of one run."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    restart: bool = False  # begin anew, whatever stands in the run folder


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `radio-train`.

    Raises:
        RadioError: an unknown recipe or setting, data or weights that are absent, a run that cannot go on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(USAGE + _listing(), highlight=False, soft_wrap=True)
        return 0 if arguments else 2
    name, options = arguments[0], arguments[1:]
    if name == TEACHERS:
        train_teachers(_parse(TeachersConfig, TeachersConfig(), options, name))
        return 0
    command = _parse(Command, Command(config=_settings(name)), options, name)
    config, configs, paths = command.config, runs_of(command.config), []
    device = choose_device(config.device)
    with join(device) as group:
        quiet = Console(quiet=True) if not group.leads else console
        for each in configs:
            path = Run(each, group, device, quiet, restart=command.restart).train()
            paths.append(path)
            quiet.print(f"checkpoint: {path}", highlight=False, soft_wrap=True)
    if group.leads and config.score:
        if compares(config):
            from .comparison_scores import compare

            compare(configs, paths, console)
        else:
            from .scoring import score

            score(config, paths[0], console)
    return 0


def _settings(name: str) -> TrainConfig:
    if name.endswith((".yaml", ".yml")):
        return read_yaml(TrainConfig, Path(name))
    if name.startswith("-"):
        raise ConfigError(
            f"the first word is a recipe or a config.yaml, got {name!r}; recipes: {', '.join(recipes)}"
        )
    return recipes[name]()


def _parse(kind: type[S], default: S, options: Sequence[str], name: str) -> S:
    return tyro.cli(kind, args=list(options), default=default, prog=f"radio-train {name}")


def _listing() -> str:
    lines = [f"  {name:<16}{(recipes[name].__doc__ or '').splitlines()[0]}" for name in recipes]
    return "\n".join(
        [*lines, f"  {TEACHERS:<16}The shipped tiny teachers, made again from the generated world."]
    )
