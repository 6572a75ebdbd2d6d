"""Progress bars on a terminal, with a text beside the bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, final, runtime_checkable

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

UpdateProgress = Callable[[int], None]
"""Advances a progress bar by a number of images."""


class ProgressFactory(Protocol):
    """Shows the progress of a long job; the command line passes one that draws a bar."""

    def __call__(self, label: str, total: int) -> AbstractContextManager[UpdateProgress]:
        """Open a context in which the progress over `total` steps is reported."""


def no_progress(label: str, total: int) -> AbstractContextManager[UpdateProgress]:
    """Open a progress context that shows nothing."""
    return nullcontext(lambda steps: None)


def time_left(seconds: float) -> str:
    """Format a remaining time: `2:05 left`; empty below half a second."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02} left" if whole else ""


@runtime_checkable
class ProgressWithText(Protocol):
    """An `UpdateProgress` that can also show a text beside the bar."""

    def __call__(self, steps: int) -> None:
        """Advance the bar by `steps`."""

    def set_postfix(self, text: str) -> None:
        """Show `text` until the next one: `loss 0.513`."""


def watch_on(console: Console, *, shown: bool) -> ProgressFactory:
    """Return a factory of bars with rate and remaining time on a console, or one that shows nothing."""
    return partial(_bar, console) if shown else no_progress


@final
class _Rate(ProgressColumn):
    """Column with the steps per second."""

    def render(self, task: Task) -> Text:
        """Render the rate; empty before the first measurement."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


@contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[UpdateProgress]:
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[text]}")),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Advancing(progress, progress.add_task(escape(label), total=total, text=""))


@final
@dataclass(frozen=True, slots=True)
class _Advancing:
    """Advances one bar, and shows a text beside it."""

    progress: Progress
    task: TaskID

    def __call__(self, steps: int) -> None:
        self.progress.advance(self.task, steps)

    def set_postfix(self, text: str) -> None:
        self.progress.update(self.task, text=escape(text))
