"""A run's figures in TensorBoard's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from radio.errors import require

from .records import Record


@final
class TensorBoard:
    """Event files in a folder; what an interrupted run wrote of later steps is hidden.

    Args:
        folder: of the event files.
        step: the last one that is done.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        require("tensorboard", extra="tensorboard")
        library = require("torch.utils.tensorboard", extra="tensorboard")
        self._writer: Any = library.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Add one record: numbers as curves, words as text."""
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
