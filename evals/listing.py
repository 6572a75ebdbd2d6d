"""`radio-eval list`: list the tasks, or the architectures with their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from radio.benchmark import count
from radio.config import parse_options
from radio.model import make_student
from radio.students import StudentOptions, students
from radio.students.vit import ViT, global_blocks
from radio.types import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """List the tasks that models are scored on."""

    archs: bool = False
    """List the architectures instead, with their parameters and multiply-adds."""


def run_list(arguments: Sequence[str], tasks: Mapping[str, str]) -> int:
    """Print the list and return the exit code 0; `tasks` maps each task to its one-line summary."""
    options = parse_options(ListOptions, arguments, prog="radio-eval list")
    console = Console(highlight=False)
    if not options.archs:
        for name, line in tasks.items():
            console.print(f"{name:12} {escape(line)}")
        return 0
    titles = ("architecture", "parameters (M)", "GMACs", "at", "summary", "token")
    table = Table(*(Column(title, no_wrap=True) for title in titles), box=None)
    windows = []
    for name in students:
        student = _outline(name)
        table.add_row(name, *_size_up(student))
        windows += _windows(name, student)
    console.print(table)
    for line in windows:
        console.print(line)
    return 0


def _outline(name: str) -> Student | Exception:
    """Build an architecture on the meta device, or return the error that prevented it."""
    try:
        with torch.device("meta"):
            return make_student(name, StudentOptions())
    except Exception as error:  # noqa: BLE001 (a plug-in's student must not prevent listing the others)
        return error


def _size_up(student: Student | Exception) -> tuple[str, ...]:
    """Return the table cells of an architecture: parameters, multiply-adds, input size and widths."""
    if isinstance(student, Exception):
        return (escape(f"cannot be built on the meta device: {str(student)[:100]}"),)
    assert isinstance(student, torch.nn.Module)
    height, width = student.native_size
    try:
        counts = count(student.eval(), (height, width))
    except Exception as error:  # noqa: BLE001 (as above)
        return (escape(f"cannot be run on the meta device: {str(error)[:100]}"),)
    return (
        f"{counts.parameters / 1e6:.2f}",
        f"{counts.gmacs:.2f}",
        f"{height}x{width}",
        str(student.summary_dim),
        str(student.token_dim),
    )


def _windows(name: str, student: Student | Exception) -> list[str]:
    """Describe the window of a vitdet student, in tokens, and its global blocks, in one line."""
    if not isinstance(student, ViT) or student.config.window is None:
        return []
    everywhere = global_blocks(student.config.depth, student.config.schedule)
    return [f"{name}: windows of {student.config.window}, global blocks {' '.join(map(str, everywhere))}"]
