"""Progress bars: what a job may say beside its bar, and how a terminal draws it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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

from .evaluator import Advance, Watch, silent


@runtime_checkable
class Telling(Protocol):
    """What a `Watch` may give instead of a bare function: it advances, and shows a text beside the bar."""

    def __call__(self, steps: int) -> None:
        """So many more steps are done."""

    def tell(self, text: str) -> None:
        """Show `text` until the next one: `loss 0.513`."""


def watch_on(console: Console, *, shown: bool) -> Watch:
    """A watch that draws bars with rate and remaining time on a console, or shows nothing."""
    return _Bars(console) if shown else silent


@final
class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """The rate, once there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


@final
class _Bars:
    """Draws one bar after the other."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, label: str, total: int) -> AbstractContextManager[Advance]:
        return self._bar(label, total)

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield _Advancing(progress, progress.add_task(escape(label), total=total, text=""))


@final
@dataclass(frozen=True, slots=True)
class _Advancing:
    """Moves one bar, and shows a word beside it."""

    progress: Progress
    task: TaskID

    def __call__(self, steps: int) -> None:
        self.progress.advance(self.task, steps)

    def tell(self, text: str) -> None:
        self.progress.update(self.task, text=escape(text))
