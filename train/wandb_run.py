"""Weights & Biases sink of a run's records, online or offline (WANDB_MODE=offline)."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any, final

from radio.config import to_plain
from radio.errors import ConfigError, DataError, require
from radio.io import read_text, write_text

from .assembly import run_name
from .config import TrainConfig
from .records import Record


@final
class WandbRun:
    """One run of the project `am-radio`; a resumed run keeps its id.

    Args:
        config: the run's settings, uploaded with its curves; the run folder gives the name.
        step: number of the last finished step.

    Raises:
        MissingExtraError: wandb is not installed.
        ConfigError: wandb cannot start a run: no login or no network.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        library: Any = require("wandb", extra="wandb")
        config.out.mkdir(parents=True, exist_ok=True)
        note = config.out / "wandb-id.txt"
        if not step or not _has_id(note):
            write_text(note, secrets.token_hex(4))
        settings = library.Settings(console="off", silent=True)
        try:
            self._run: Any = library.init(
                project="am-radio",
                name=run_name(config),
                id=note.read_text(encoding="utf-8").strip(),
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


def _has_id(note: Path) -> bool:
    try:
        return re.fullmatch(r"[0-9a-f]{8}\s*", read_text(note, limit=100)) is not None
    except DataError:  # missing, or not ours
        return False
