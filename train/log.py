"""The log of a run: each record is written to every configured sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from .config import TrainConfig
from .records import LOG, Record
from .sinks import JsonLines, Sink
from .tensorboard_files import TensorBoard
from .wandb_run import WandbRun


@final
class Log:
    """`metrics.jsonl` and further sinks; one of those that fails is reported once and then dropped.

    Args:
        lines: `metrics.jsonl`.
        sinks: the other sinks.
        tell: called with a message about what could not be written.
    """

    def __init__(self, lines: JsonLines, sinks: Sequence[Sink], tell: Callable[[str], None]) -> None:
        self._lines, self._sinks, self._tell = lines, list(sinks), tell

    def write(self, record: Record) -> None:
        """Write a record to every sink."""
        self._lines.write(record)
        for sink in tuple(self._sinks):
            try:
                sink.write(record)
            except OSError as error:
                self._sinks.remove(sink)
                self._tell(f"{type(sink).__name__} writes no more ({error.strerror or error})")

    def flush(self) -> str:
        """Retry the file's unwritten records; return the reason of a new failure, else an empty string."""
        return self._lines.flush()

    def close(self) -> None:
        """Close all sinks.

        Raises:
            RadioError: some records cannot be written.
        """
        for sink in self._sinks:
            sink.close()
        self._lines.close()


def open_log(config: TrainConfig, step: int, tell: Callable[[str], None]) -> Log:
    """Open `metrics.jsonl` and the configured sinks; drop records of steps after `step`.

    Raises:
        MissingExtraError: a sink's library is not installed; the message names the extra to install.
        DataError, OSError: the file cannot be read or written.
    """
    others: list[Sink] = []
    for name in dict.fromkeys(config.loggers):  # before the file, since a library may be missing
        if name == "tensorboard":
            others.append(TensorBoard(config.out / "tensorboard", step))
        else:
            others.append(WandbRun(config, step))
    lines = JsonLines(config.out / LOG, step, tell)
    if lines.begins and step >= config.log_every:
        evaluates = config.eval_every and step % config.eval_every == 0
        first = step if evaluates else min(step - step % config.log_every + config.log_every, config.steps)
        tell(f"{config.out / LOG}: holds no record of the {step} steps before, and begins with step {first}")
    return Log(lines, others, tell)
