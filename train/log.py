"""The log of a run: one record, written to every sink that is asked for."""

from __future__ import annotations

from typing import final

from .config import TrainConfig
from .sinks import JsonLines, Record, Sink
from .tensorboard_files import TensorBoard
from .wandb_run import WandbRun


@final
class Log:
    """Several sinks as one."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        """Give every sink a record."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """End them all."""
        for sink in self._sinks:
            sink.close()


def open_log(config: TrainConfig, step: int) -> Log:
    """`metrics.jsonl` in the run folder and the settings' own sinks; records of steps after `step` go.

    Raises:
        MissingExtraError: a sink's library is not installed; names the extra that brings it.
    """
    others: list[Sink] = []
    for name in dict.fromkeys(config.sinks):  # before the file, since they may be missing
        if name == "tensorboard":
            others.append(TensorBoard(config.out / "tensorboard", step))
        else:
            others.append(WandbRun(config, step))
    return Log([JsonLines(config.out / "metrics.jsonl", step), *others])
