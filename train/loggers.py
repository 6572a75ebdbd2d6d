"""The log of a run: its records, `metrics.jsonl`, TensorBoard, Weights & Biases, and the console."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple, Protocol, Self, final

from annotated_types import Ge
from pydantic import AllowInfNan, TypeAdapter
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import TypedDict

from radio.config import to_plain
from radio.errors import ConfigError, DataError, RadioError, require, shown
from radio.io import (
    MAX_DATA_BYTES,
    decode_text,
    lines_of,
    parse_json,
    read_bytes,
    read_text,
    validate,
    write_bytes,
    write_text,
)
from radio.progress import time_left

from .config import TrainConfig, run_name

Record = dict[str, float | int | str | None]
"""The figures of one log step by name; `step` is one of them."""

LOG = "metrics.jsonl"  # in the run folder


class _Stepped(TypedDict):
    step: Annotated[int, Ge(0)]


_STEPPED = TypeAdapter(_Stepped)
_RECORD = TypeAdapter(dict[str, int | Annotated[float, AllowInfNan(False)] | str | None])


class ConsoleLog(NamedTuple):
    """The lines of a log."""

    records: list[tuple[str, Record]]  # each line as written, and its record
    num_others: int  # lines that are no records, except a last one cut off by a kill


def read_records(path: Path) -> list[Record]:
    """Read the records of a run's log, in order.

    Raises:
        DataError: as `read_lines`.
    """
    return [record for _, record in read_lines(path).records]


def read_lines(path: Path) -> ConsoleLog:
    """Read the lines of a run's log, in order, also of a damaged one; nothing where there is no such file.

    Raises:
        DataError: it is not a regular file, or cannot be opened.
    """
    if not path.exists():
        return ConsoleLog([], 0)
    data = read_bytes(path, limit=MAX_DATA_BYTES)
    try:
        text = decode_text(data, path)
    except DataError:  # part of it is not text: the other lines are intact
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")
    records: list[tuple[str, Record]] = []
    lines, num_others = lines_of(text), 0
    for number, line in enumerate(lines, 1):
        record = _parse(line, path)
        if record is not None:
            records.append((line, record))
        elif line.strip() and (number < len(lines) or text.endswith("\n")):
            num_others += 1
    return ConsoleLog(records, num_others)


def _parse(line: str, path: Path) -> Record | None:
    try:
        line.encode()
        record = validate(_RECORD, parse_json(line, path), path)
        validate(_STEPPED, {"step": record.get("step")}, path)
    except (DataError, UnicodeEncodeError):
        return None
    return record


class Logger(Protocol):
    """A place for records."""

    def write(self, record: Record) -> None:
        """Write one record."""

    def close(self) -> None:
        """Finish writing and close."""


@final
class JsonLines:
    """`metrics.jsonl`: one record per log step, written to disk immediately.

    A failed write (such as a full disk) is reported and retried with the next record.

    Args:
        path: the file.
        step: records of later steps, from an interrupted run, are dropped.
        tell: called with a message about what could not be read or written.

    Raises:
        DataError: the file cannot be read.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, step: int, tell: Callable[[str], None]) -> None:
        self._path, self._tell = path, tell
        lines = read_lines(path)
        if lines.num_others:
            data = path.read_bytes()
            copy = path.with_suffix(f".damaged-{hashlib.sha256(data).hexdigest()[:8]}{path.suffix}")
            write_bytes(copy, data)
            tell(f"{path}: {lines.num_others} lines are no records, and left out; the file as it was: {copy}")
        kept = [line for line, record in lines.records if int(record["step"] or 0) <= step]
        self.begins = not kept  # the file begins with the next record
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        self._pending = b""

    def write(self, record: Record) -> None:
        """Append one record; a mean over no steps is null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        waiting = bool(self._pending)
        self._pending += (json.dumps(plain, allow_nan=False) + "\n").encode()
        reason = self.flush()
        if reason and not waiting:
            self._tell(f"{self._path} could not be written ({reason}); its records are kept until it can")

    def flush(self) -> str:
        """Retry unwritten records; return the reason of a new failure, else an empty string."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(self._pending)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)  # no half of a record
            return error.strerror or str(error)
        self._pending = b""
        return ""

    def close(self) -> None:
        """Close the file.

        Raises:
            RadioError: some records cannot be written.
        """
        reason = self.flush()
        self._file.close()
        if reason:
            raise RadioError(
                f"{self._path}: the last records could not be written ({reason}); make room and give the "
                f"same command again"
            )


@final
class TensorBoard:
    """Event files in `tensorboard/`; later steps written by an interrupted run are hidden.

    Args:
        config: the run's settings.
        step: number of the last finished step.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        require("tensorboard", extra="tensorboard")
        library = require("torch.utils.tensorboard", extra="tensorboard")
        self._writer: Any = library.SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Add one record: numbers as scalars, strings as text."""
        step = int(record["step"] or 0)
        for name, value in record.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            elif value is not None and name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


@final
class WandbRun:
    """One run of the project `am-radio`, online or offline (WANDB_MODE=offline); a resumed run keeps its id.

    Args:
        config: the run's settings, uploaded with its curves; the run folder gives the name.
        step: number of the last finished step.

    Raises:
        MissingExtraError: wandb is not installed.
        ConfigError: wandb cannot start a run: no login or no network.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        library: Any = require("wandb", extra="wandb")
        id_file = config.out / "wandb-id.txt"
        run_id = ""
        if step:
            with suppress(DataError):  # missing, or not ours
                run_id = read_text(id_file, limit=100).strip()
        if re.fullmatch(r"[0-9a-f]{8}", run_id) is None:
            run_id = secrets.token_hex(4)
            write_text(id_file, run_id)
        settings = library.Settings(console="off", silent=True)
        try:
            self._run: Any = library.init(
                project="am-radio",
                name=run_name(config),
                id=run_id,
                dir=str(config.out),
                config=to_plain(config),
                resume=None if settings.mode == "offline" else "allow",
                settings=settings,
            )
        except library.errors.Error as error:  # no login or no network
            raise ConfigError(
                f"wandb takes no run ({error}); log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Add one record."""
        self._run.log({name: value for name, value in record.items() if value is not None})

    def close(self) -> None:
        """Upload the remaining records and end the run."""
        self._run.finish()


@final
class Log:
    """`metrics.jsonl` and further loggers; one of those that fails is reported once and then dropped.

    Args:
        lines: `metrics.jsonl`.
        others: the other loggers.
        tell: called with a message about what could not be written.
    """

    def __init__(self, lines: JsonLines, others: Sequence[Logger], tell: Callable[[str], None]) -> None:
        self._lines, self._others, self._tell = lines, list(others), tell

    def write(self, record: Record) -> None:
        """Write a record to every logger."""
        self._lines.write(record)
        for logger in tuple(self._others):
            try:
                logger.write(record)
            except OSError as error:
                self._others.remove(logger)
                self._tell(f"{type(logger).__name__} writes no more ({error.strerror or error})")

    def flush(self) -> str:
        """Retry the file's unwritten records; return the reason of a new failure, else an empty string."""
        return self._lines.flush()

    def close(self) -> None:
        """Close all loggers.

        Raises:
            RadioError: some records cannot be written.
        """
        for logger in self._others:
            logger.close()
        self._lines.close()


_LOGGERS: dict[str, Callable[[TrainConfig, int], Logger]] = {"tensorboard": TensorBoard, "wandb": WandbRun}


def open_log(config: TrainConfig, step: int, tell: Callable[[str], None], last: int | None = None) -> Log:
    """Open `metrics.jsonl` and the configured loggers; drop records of steps after `step`.

    `last` is the step of the next record at the latest; None = the run's last one.

    Raises:
        MissingExtraError: a logger's library is not installed; the message names the extra to install.
        DataError, OSError: the file cannot be read or written.
    """
    # The others come first, since a library may be missing.
    others = [_LOGGERS[name](config, step) for name in dict.fromkeys(config.loggers)]
    lines = JsonLines(config.out / LOG, step, tell)
    if lines.begins and step >= config.log_every:
        evaluates = config.eval_every and step % config.eval_every == 0
        first = (
            step
            if evaluates
            else min(step - step % config.log_every + config.log_every, last or config.steps)
        )
        tell(f"{config.out / LOG}: holds no record of the {step} steps before, and begins with step {first}")
    return Log(lines, others, tell)


def say(console: Console, line: str) -> None:
    """Print a line literally: without markup, and with control characters escaped."""
    console.print(shown(line), markup=False, emoji=False, highlight=False, soft_wrap=True)


@final
class ProgressConsole:
    """A progress bar with loss, rate and remaining time on a terminal; lines with the same elsewhere."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(shown(title), total=total, completed=done, figures="")
        self._title, self._total, self._done = title, total, done
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, done: int, figures: str = "") -> None:
        """Set the progress to `done`; `figures` is a text to show beside it."""
        if figures:
            self._progress.update(self._task, figures=shown(figures))
        self._progress.update(self._task, completed=done)
        if figures and not self.console.is_terminal:
            pace = (time.monotonic() - self._started) / max(done - self._done, 1)
            line = f"{self._title} {done}/{self._total}  {figures}  {time_left(pace * (self._total - done))}"
            say(self.console, line.rstrip())


def summarise(record: Record, config: TrainConfig) -> str:
    """Format one record in a line: the loss, each teacher's summary/spatial losses, and the rate.

    A loss with weight 0 is shown as a dash.
    """

    def part(name: str, weight: float) -> str:
        return f"{record[name]:.3f}" if weight else "-"

    losses = " ".join(
        f"{t.name} {part(f'{t.name}/summary', t.summary_weight)}/"
        f"{part(f'{t.name}/spatial', t.spatial_weight)}"
        for t in config.teachers
    )
    return f"loss {record['loss']:.3f}  {losses}  {record['images_per_second']:.0f} img/s"
