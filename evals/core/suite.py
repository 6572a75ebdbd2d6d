"""Run several evaluators: on one model, on several models side by side, or with several seeds."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from radio.config import to_plain
from radio.dist import Ranks
from radio.entry import keep_freed_memory
from radio.errors import ConfigError, DataError, RadioError
from radio.foreign import blame
from radio.io import exclusive, read_json, write_text
from radio.progress import ProgressFactory, no_progress, time_left
from radio.resources import collect
from radio.types import Backbone

from .evaluator import machine_settings, run_evaluator
from .report import Kind, Report, file_name, metric_text, read
from .task import Evaluator, RunSettings, make_evaluator, task_of

_STATE = "all.json"
_FORMAT: Literal["am-radio-all/1"] = "am-radio-all/1"


class _FinishedTask(TypedDict):
    """A finished task."""

    key: str
    report: str  # its file


class _FinishedTasks(TypedDict):
    """Content of `all.json`."""

    format: Literal["am-radio-all/1"]
    tasks: dict[str, _FinishedTask]  # by the report's name


_FILE = TypeAdapter(_FinishedTasks)


Jobs = Mapping[str, tuple[Evaluator[Any], Any]]
"""The evaluator and the settings of each task, by its name, or by `name_job` on a data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Outcome of one task."""

    task: str
    state: Literal["done", "kept", "left out", "failed"]
    report: Report | None = None
    reason: str = ""

    @property
    def primary_metric_text(self) -> str:
        """The primary metric as text: `82.1 ±1.9`; `failed` or `left out` where there is no report."""
        return metric_text(self.report.metrics[self.report.primary_metric]) if self.report else self.state

    def describe(self) -> str:
        """Format it in a line: `knn: top1 82.1 ±1.9`, `knn: failed: REASON`."""
        if self.report is None:
            return f"{self.task}: {self.state}: {self.reason}"
        kept = ", unchanged, kept" if self.state == "kept" else ""
        return f"{self.task}: {self.report.primary_metric} {self.primary_metric_text}{kept}"


def run_all(
    model: Backbone,
    jobs: Jobs,
    out: Path,
    *,
    run: RunSettings,
    name: str,
    progress: ProgressFactory,
    ranks: Ranks,
    log: Callable[[str], None],
    kind: Kind | None = None,
) -> list[Outcome]:
    """Run every task in the order of `jobs` and return the outcomes; each report is written at once.

    A task is skipped when its report exists and weights, settings and data are unchanged: `all.json` in `out`
    holds a hash of them. A task that fails is reported and does not stop the others.

    Args:
        jobs: each task's evaluator and settings, by the task's name or that of `name_job`.
        out: the folder of the reports.
        name: the model's name in the reports.
        run: settings that all tasks share.
        log: prints a line about the progress.
        kind: of the model; see `run_evaluator`.
    """
    fingerprint, outcomes = model.fingerprint, []
    for task, (evaluator, settings) in jobs.items():
        outcome = _missing(task, evaluator, model)
        key, base = "", file_name(task, name)
        if outcome is None:
            key = task_key(task, fingerprint, settings, run)
            outcome = _kept(out, task, base, key, fingerprint)
        if outcome is None:
            log(f"{task}: running")
            score = partial(run_evaluator, evaluator, model, settings, out, run=run, name=name, kind=kind)
            outcome = _attempt(task, partial(score, ranks=ranks, progress=progress), ranks)
            if outcome.report is None:
                _free_memory()
            elif ranks.leads:
                _note(out, base, key, outcome.report)
        outcomes.append(outcome)
        if outcome.state == "kept":
            log(f"{task}: unchanged, kept")
        elif outcome.state != "done":
            log(f"{task}: {outcome.state}: {outcome.reason}")
    return outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A model and its tasks, for `run_contestants`; with several processes it must be picklable."""

    name: str
    load: Callable[[], Backbone]
    tasks: Mapping[str, Any]  # their settings by name, of the task or of `name_job`
    out: Path  # folder of its reports
    kind: Kind | None = None  # see `run_evaluator`


def run_contestants(
    contestants: Sequence[Contestant],
    *,
    run: RunSettings,
    workers: int,
    progress: ProgressFactory,
    log: Callable[[str, str], None],
    ranks: Ranks | None = None,
) -> dict[str, list[Outcome]]:
    """Run the tasks of several models as `run_all` does; return each model's outcomes by its name.

    Small models gain more from a second task in another process than from a second thread in one task.

    Args:
        contestants: the models, of different names.
        run: settings that all tasks share.
        workers: processes that share the threads, each with one task at a time; 1 = none but this one.
        progress: of a task, with one worker.
        log: prints a line about the model of a name.
        ranks: that score together, with one worker.

    Raises:
        RadioError: a process was killed.
    """
    if workers == 1:
        return {
            each.name: _run(each, run, progress, ranks or Ranks(), partial(log, each.name))
            for each in contestants
        }
    waiting = [replace(each, tasks={task: each.tasks[task]}) for each in contestants for task in each.tasks]
    # The longest first, so that none is left over at the end.
    waiting.sort(key=lambda turn: not any(make_evaluator(task_of(job)).expensive for job in turn.tasks))
    total, running = len(waiting), dict[Future[list[Outcome]], tuple[Contestant, float]]()
    done: dict[tuple[str, str], Outcome] = {}
    seconds: list[tuple[str, float]] = []
    with _pool(workers) as pool:
        while waiting or running:
            while waiting and len(running) < workers:
                turn = waiting.pop(0)
                future = pool.submit(_run, turn, run, no_progress, Ranks(), _say_nothing)
                running[future] = turn, time.monotonic()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                turn, began = running.pop(future)
                [outcome] = future.result()
                done[turn.name, outcome.task] = outcome
                if outcome.state == "done":
                    seconds.append((outcome.task, time.monotonic() - began))
                tasks = [
                    task
                    for each in (*waiting, *(turn for turn, _ in running.values()))
                    for task in each.tasks
                ]
                left = time_left(_expected(tasks, seconds) / workers)
                state = f"{len(done)} of {total}, about {left}" if left else f"{len(done)} of {total}"
                log(turn.name, f"{outcome.describe()} ({state})")
    return {each.name: [done[each.name, task] for task in each.tasks] for each in contestants}


def _run(
    contestant: Contestant,
    run: RunSettings,
    progress: ProgressFactory,
    ranks: Ranks,
    log: Callable[[str], None],
) -> list[Outcome]:
    return run_all(
        contestant.load(),
        {job: (make_evaluator(task_of(job)), settings) for job, settings in contestant.tasks.items()},
        contestant.out,
        run=run,
        name=contestant.name,
        kind=contestant.kind,
        progress=progress,
        ranks=ranks,
        log=log,
    )


def _say_nothing(line: str) -> None:
    """Take a line of a process whose outcomes are printed by another one."""


def _expected(tasks: Sequence[str], seconds: Sequence[tuple[str, float]]) -> float:
    """Estimate the seconds of tasks from those of finished ones: of the same name, or else of any."""
    every = [duration for _, duration in seconds]
    if not every:
        return 0.0
    same = {task: [duration for name, duration in seconds if name == task] or every for task in tasks}
    return sum(sum(same[task]) / len(same[task]) for task in tasks)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes that share the threads; they end with this process, however it ends."""
    threads = str(max(1, torch.get_num_threads() // workers))
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks that other threads hold
    alive, held = context.Pipe(duplex=False)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads  # also for FAISS; read when a process starts
    try:
        with ProcessPoolExecutor(workers, context, _begin, (alive,)) as pool:
            try:
                yield pool
            except BaseException as error:
                held.close()
                if isinstance(error, BrokenProcessPool):
                    raise RadioError(
                        "a process that scored was killed, perhaps for its memory; the same command goes on"
                    ) from error
                raise
    finally:
        held.close()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _begin(alive: Connection) -> None:
    """Prepare a process of `_pool`: it ends when the other end of the pipe is closed."""

    def watch() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    keep_freed_memory()


def _missing(task: str, evaluator: Evaluator[Any], model: Backbone) -> Outcome | None:
    """Return the outcome of a task whose requirements the model does not meet; None when it meets all."""
    try:
        lack = evaluator.missing_requirements(model)
    except Exception as error:  # noqa: BLE001 (a named requirement is missing or broken)
        return Outcome(task=task, state="failed", reason=_reason(error))
    return Outcome(task=task, state="left out", reason=lack) if lack else None


def _attempt(task: str, run: Callable[[], Report], group: Ranks) -> Outcome:
    try:
        return Outcome(task=task, state="done", report=run())
    except MemoryError:
        raise
    except Exception as error:  # whatever error a task raises, the others continue
        reason = _reason(error)
        if group.world > 1 and not isinstance(error, RadioError):
            # The error may be this rank's alone: the others would wait for it in the middle of the task.
            raise RadioError(f"{task}: failed on rank {group.rank} of {group.world}: {reason}") from error
    return Outcome(task=task, state="failed", reason=reason)


def task_key(task: str, fingerprint: str, settings: Any, run: RunSettings) -> str:
    """Hash the model, the settings, and the files that the settings name (by sizes and times).

    The machine's part of `run` changes no score: its cache folder above all changes with every task.
    """
    machine = machine_settings(run)
    shared = {name: value for name, value in to_plain(run).items() if name not in machine}
    plain = [to_plain(settings), shared]
    files = [_signature(Path(value)) for value in _texts(plain) if _is_path(value)]
    parts = [_FORMAT, task, fingerprint, plain, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _kept(out: Path, task: str, base: str, key: str, fingerprint: str) -> Outcome | None:
    """Return the outcome of a finished task of one model if its report is still valid, else None."""
    entry = _state(out).get(base)
    if entry is None or entry["key"] != key:
        return None
    try:
        report = read(out / entry["report"])
    except RadioError:  # deleted or altered: recomputed
        return None
    if report.fingerprint != fingerprint or not all((out / name).is_file() for name in report.files):
        return None
    return Outcome(task=task, state="kept", report=report)


def _note(out: Path, base: str, key: str, report: Report) -> None:
    entry: _FinishedTask = {"key": key, "report": f"{file_name(report.task, report.model)}.json"}
    with exclusive(out):  # other processes may note theirs
        tasks = {**_state(out), base: entry}
        write_text(out / _STATE, json.dumps({"format": _FORMAT, "tasks": tasks}, indent=2) + "\n")


def _state(out: Path) -> dict[str, _FinishedTask]:
    try:
        return read_json(out / _STATE, _FILE)["tasks"]
    except RadioError:  # absent or damaged: everything is recomputed
        return {}


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
    return bool(text) and ("{" in text or _exists(Path(text)))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # an invalid file name
        return False


def _signature(path: Path) -> list[Any]:
    """List names, sizes and times of all files under a path; for a pattern, of its folder."""
    root = path if _exists(path) else path.parent
    if root.is_file():
        stat = root.stat()
        return [[str(root.resolve()), stat.st_size, stat.st_mtime_ns]]
    signatures = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            try:
                stat = file.stat()
            except OSError:  # a broken link
                stat = file.lstat()
            signatures.append([str(file), stat.st_size, stat.st_mtime_ns])
    return signatures


def _reason(error: BaseException) -> str:
    if isinstance(error, RadioError):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        # Only its first sentence: the rest is advice on PyTorch's allocator.
        reason = str(error).split(". ")[0]
        return (
            f"the GPU's memory is full ({reason}); it is freed for the next task; take a smaller --batch-size"
        )
    return blame(error) or f"{type(error).__name__}: {error}"


def _free_memory() -> None:
    collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


FORMAT = "am-radio-noise/1"
NOISE_FILE = "noise.json"

_APART = 1.959964 * 2**0.5  # in standard deviations: 5 % of pairs of runs differ by more

Noise = dict[str, dict[str, float]]
"""By task and metric: the difference that 95 % of pairs of runs do not exceed."""


class _NoiseFile(TypedDict):
    """Content of a noise file."""

    format: Literal["am-radio-noise/1"]
    tasks: dict[str, dict[str, Annotated[float, Field(ge=0, le=1e100)]]]


_NOISE = TypeAdapter(_NoiseFile)


def measure_noise(
    model: Backbone,
    jobs: Jobs,
    *,
    run: RunSettings,
    repeats: int,
    name: str,
    progress: ProgressFactory,
    log: Callable[[str], None],
) -> Noise:
    """Measure the noise of every metric of the repeatable tasks; deterministic ones have no entry.

    Of a task on several data sets, a metric's noise is the largest.

    Raises:
        ConfigError: fewer than two repeats.
    """
    if repeats < 2:
        raise ConfigError(f"--repeats {repeats}: a spread needs two or more")
    noise: Noise = {}
    for task, (evaluator, settings) in jobs.items():
        if evaluator.with_seed is None:
            log(f"{task}: exact")
            continue
        values: dict[str, list[float]] = {}
        with TemporaryDirectory(prefix="am-radio-noise-") as folder:
            for number in range(repeats):
                log(f"{task}: run {number + 1} of {repeats}")
                again = evaluator.with_seed(settings, run, number)
                report = run_evaluator(
                    evaluator, model, again, Path(folder), run=run, name=name, progress=progress
                )
                for metric, value in report.metrics.items():
                    values.setdefault(metric, []).append(value.value)
        largest = noise.setdefault(evaluator.name, {})
        for metric, seen in values.items():
            if len(seen) > 1:
                largest[metric] = max(largest.get(metric, 0.0), float(_APART * np.std(seen, ddof=1)))
    return noise


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
        return read_json(path, _NOISE)["tasks"]
    except DataError as error:
        raise DataError(f"no file of noise; radio-eval noise MODEL writes one ({error})") from error
