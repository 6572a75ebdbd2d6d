"""Command line `radio-scenes OUT`: write the generated world to a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from radio.config import Workers, check, parse_options
from radio.errors import RadioError, one_line, shown

from .export import ScenesSettings, write


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Write the generated world: images with class, captions, masks and questions."""

    out: tyro.conf.Positional[Path]
    """Folder to write; it must be absent, empty, or hold exactly these scenes."""
    layout: Annotated[str, tyro.conf.arg(aliases=["-l"])] = "image-folder"
    """Layout: image-folder, webdataset, ade20k, coco, lvis or llava."""
    count: int = 2000
    """Number of training scenes; a multiple of 60 holds every class equally often."""
    val_count: int | None = None
    """Number of validation scenes, 0 for none. Default: a tenth of the count."""
    size: int = 96
    """Side of the images in pixels, 32 to 1024."""
    seed: int = 0
    """Random seed; training and validation never share scenes."""
    workers: Workers = 1
    """Number of processes; does not change the output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of `radio-scenes`: 0 if the folder holds the scenes, 2 after a one-line error."""
    arguments = parse_options(Arguments, sys.argv[1:] if argv is None else argv, prog="radio-scenes")
    console = Console(stderr=True, soft_wrap=True)
    settings = ScenesSettings(
        layout=arguments.layout,
        count=arguments.count,
        val_count=max(1, arguments.count // 10) if arguments.val_count is None else arguments.val_count,
        seed=arguments.seed,
        size=arguments.size,
    )
    try:
        check(arguments)
        written = _write(arguments, settings, console)
    except (RadioError, OSError, MemoryError) as error:
        console.print(f"error: {one_line(error)}", markup=False, highlight=False)
        return 2
    action = "wrote" if written else "already there:"
    summary = f"{action} {settings.count} + {settings.val_count} scenes, layout {settings.layout}: "
    console.print(summary + shown(arguments.out), markup=False, highlight=False)
    return 0


def _write(arguments: Arguments, settings: ScenesSettings, console: Console) -> bool:
    columns = (TextColumn("scenes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scenes", total=settings.count + settings.val_count)
        return write(
            arguments.out,
            settings,
            workers=arguments.workers,
            progress=lambda done: bar.advance(task, done),
        )


if __name__ == "__main__":
    sys.exit(main())
