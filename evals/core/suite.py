"""Every evaluator on one model: those that it has what they need for, one after the other, none twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from radio.config import to_plain
from radio.errors import RadioError
from radio.io import write_text
from radio.types import Backbone

from .dist import Group
from .evaluator import Evaluator, Watch
from .report import Report, file_name, read

_STATE = "all.json"
_FORMAT = "am-radio-all/1"
# What a task may end with and the others go on: all but an interruption or a want of memory.
_FAILURES = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    OSError,
    ArithmeticError,
    AssertionError,
    ImportError,
)


@runtime_checkable
class Particular(Protocol):
    """An evaluator that not every model can take."""

    def lacks(self, model: Backbone) -> str:
        """What the model lacks for it, in words; empty where nothing is lacking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one task ended."""

    task: str
    state: Literal["done", "kept", "left out", "failed"]
    report: Report | None = None
    reason: str = ""


def run_all(
    model: Backbone,
    jobs: Mapping[str, tuple[Evaluator[Any], Any]],
    out: Path,
    *,
    name: str,
    watch: Watch,
    group: Group,
    tell: Callable[[str], None],
) -> list[Outcome]:
    """The outcome of every task, in the order of `jobs`; each report is on disk before the next task begins.

    A task is kept when its report is there and weights, settings and data are what they were: `all.json` in
    `out` holds a hash of them. A task that fails is told and does not stop the others.

    Args:
        jobs: each task's evaluator and settings.
        out: the folder of the reports.
        name: what the reports call the model.
        tell: says in a line what is going on.
    """
    fingerprint, outcomes = model.fingerprint, []
    for task, (evaluator, settings) in jobs.items():
        lack = evaluator.lacks(model) if isinstance(evaluator, Particular) else ""
        if lack:
            outcomes.append(Outcome(task=task, state="left out", reason=lack))
            tell(f"{task}: left out: {lack}")
            continue
        key = task_key(task, fingerprint, settings)
        base = file_name(task, name)
        kept = _kept(out, base, key, fingerprint)
        if kept is not None:
            outcomes.append(Outcome(task=task, state="kept", report=kept))
            tell(f"{task}: unchanged, kept")
            continue
        tell(f"{task}: running")
        try:
            report = evaluator.run(model, settings, out, name=name, watch=watch)
        except _FAILURES as error:
            said = str(error) if isinstance(error, RadioError) else f"{type(error).__name__}: {error}"
            outcomes.append(Outcome(task=task, state="failed", reason=said))
            tell(f"{task}: failed: {said}")
            continue
        if group.leads:
            _note(out, base, key, report)
        outcomes.append(Outcome(task=task, state="done", report=report))
    return outcomes


def task_key(task: str, fingerprint: str, settings: Any) -> str:
    """A hash of the model, the settings, and the files that the settings name (by sizes and times)."""
    plain = to_plain(settings)
    files = [_signature(Path(value)) for value in _texts(plain) if _is_path(value)]
    parts = [_FORMAT, task, fingerprint, plain, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _kept(out: Path, base: str, key: str, fingerprint: str) -> Report | None:
    """The report of a finished task of one model, if it is the one that would be made again."""
    entry = _state(out).get(base)
    if entry is None or entry.get("key") != key:
        return None
    try:
        report = read(out / entry["report"])
    except RadioError:  # gone or altered: made again
        return None
    whole = all((out / name).is_file() for name in report.files)
    return report if whole and report.fingerprint == fingerprint else None


def _note(out: Path, base: str, key: str, report: Report) -> None:
    tasks = {**_state(out), base: {"key": key, "report": f"{file_name(report.task, report.model)}.json"}}
    write_text(out / _STATE, json.dumps({"format": _FORMAT, "tasks": tasks}, indent=2) + "\n")


def _state(out: Path) -> dict[str, Any]:
    path = out / _STATE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # damaged: everything is made again
        return {}
    tasks = found.get("tasks") if isinstance(found, dict) and found.get("format") == _FORMAT else None
    return tasks if isinstance(tasks, dict) else {}


def _texts(plain: Any) -> Iterator[str]:
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, Mapping):
        for value in plain.values():
            yield from _texts(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _texts(value)


def _is_path(text: str) -> bool:
    return bool(text) and ("{" in text or Path(text).exists())


def _signature(path: Path) -> list[Any]:
    """Names, sizes and times of everything under a path; a pattern stands for the files beside it."""
    root = path if path.exists() else path.parent
    if root.is_file():
        stat = root.stat()
        return [[str(root.resolve()), stat.st_size, stat.st_mtime_ns]]
    found = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            stat = Path(folder, name).stat()
            found.append([str(Path(folder, name)), stat.st_size, stat.st_mtime_ns])
    return found
