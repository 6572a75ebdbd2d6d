"""Work cut into chunks, one file each: ranks share them, and a killed run lacks only what it had not made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import safetensors

from radio.errors import DataError


def chunk_path(folder: Path, number: int, ending: str = "safetensors") -> Path:
    """The file of a chunk."""
    return folder / f"{number:06d}.{ending}"


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and undamaged; one that is not is made again."""
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt"):
            return True
    except safetensors.SafetensorError:
        return False


def check_all_there(paths: Iterable[Path]) -> None:
    """Nothing, when every rank's chunks are in the folder.

    Raises:
        DataError: some are not: the ranks do not share it.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path.parent}: what other ranks made is not here; give --cache a folder that all share"
            )
