"""TensorBoard sink of a run's records."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from radio.errors import require

from .records import Record


@final
class TensorBoard:
    """Event files in a folder; later steps written by an interrupted run are hidden.

    Args:
        folder: folder of the event files.
        step: number of the last finished step.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        require("tensorboard", extra="tensorboard")
        library = require("torch.utils.tensorboard", extra="tensorboard")
        self._writer: Any = library.SummaryWriter(str(folder), purge_step=step + 1)

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
