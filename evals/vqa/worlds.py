"""Folders of generated files in the cache: written atomically and once, and again if damaged."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from radio.errors import DataError
from radio.io import make_folder, read_json, write_text

if TYPE_CHECKING:
    from radio.chunks import Damage

_METADATA = TypeAdapter(dict[str, Any])
_DIGEST = "digest"  # key in the metadata: hash of all other files


def make_world(
    root: Path, metadata: str, wanted: Mapping[str, Any], fill: Callable[[Path], None], damage: Damage | None
) -> None:
    """Write a folder of generated files, unless it exists; a damaged one is deleted first.

    Args:
        root: the folder; it appears when it is complete.
        metadata: file name of the metadata in it.
        wanted: contents of the metadata, without the digest.
        fill: writes all files but the metadata.
        damage: collects a damaged folder's error.

    Raises:
        DataError: a folder that holds something else.
    """

    def fill_and_sign(folder: Path) -> None:
        fill(folder)
        write_text(folder / metadata, json.dumps({**wanted, _DIGEST: _digest(folder, metadata)}) + "\n")

    if _is_there(root, metadata, wanted, damage):
        return
    make_folder(root, fill_and_sign)


def _is_there(root: Path, metadata: str, wanted: Mapping[str, Any], damage: Damage | None) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / metadata).exists():
        raise DataError(
            f"{root}: holds something else than what is asked for, and no {metadata}; move it away"
        )
    try:
        found = read_json(root / metadata, _METADATA)
        digest = found.pop(_DIGEST, None)
        if found == wanted and digest != _digest(root, metadata):
            raise DataError(f"{root}: its files are not those that were written there")
    except DataError as error:
        _throw_away(root)
        if damage is not None:
            from radio.chunks import DamagedError

            damage.add(DamagedError(str(error)))
        return False
    if found != wanted:
        raise DataError(
            f"{root}: holds something else than what is asked for ({dict(wanted)}), namely {found}; give "
            f"another folder"
        )
    return True


def _digest(root: Path, metadata: str) -> str:
    sha = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path != root / metadata and path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        sha.update(f"{path.relative_to(root).as_posix()} {content}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()


def _throw_away(root: Path) -> None:
    doomed = root.with_name(f".{root.name}.damaged-{secrets.token_hex(4)}")
    root.rename(doomed)  # rename first: another run may look in the meantime
    shutil.rmtree(doomed, ignore_errors=True)
