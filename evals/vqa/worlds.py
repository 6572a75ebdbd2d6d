"""Folders of generated files in the cache: made whole and once, and made again where they were damaged."""

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
    from evals.core.chunks import Damage  # torch comes with it

_CARD = TypeAdapter(dict[str, Any])
_DIGEST = "digest"  # its key in a card: over all other files


def make_world(
    root: Path, card: str, wanted: Mapping[str, Any], fill: Callable[[Path], None], damage: Damage | None
) -> None:
    """Make a folder of generated files, unless it is there; a damaged one is thrown away first.

    Args:
        root: the folder; it appears when it is complete.
        card: the name of the file in it that says what it holds.
        wanted: what it holds, as the card says it.
        fill: writes the files, all but the card.
        damage: learns of a damaged folder.

    Raises:
        DataError: a folder that holds something else.
    """

    def fill_and_sign(folder: Path) -> None:
        fill(folder)
        write_text(folder / card, json.dumps({**wanted, _DIGEST: _digest(folder, card)}) + "\n")

    if _is_there(root, card, wanted, damage):
        return
    make_folder(root, fill_and_sign)


def _is_there(root: Path, card: str, wanted: Mapping[str, Any], damage: Damage | None) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / card).exists():
        raise DataError(f"{root}: holds something else than what is asked for, and no {card}; move it away")
    try:
        found = read_json(root / card, _CARD)
        digest = found.pop(_DIGEST, None)
        if found == wanted and digest != _digest(root, card):
            raise DataError(f"{root}: its files are not those that were written there")
    except DataError as error:
        _throw_away(root)
        if damage is not None:
            from evals.core.chunks import DamagedError

            damage.add(DamagedError(str(error)))
        return False
    if found != wanted:
        raise DataError(
            f"{root}: holds something else than what is asked for ({dict(wanted)}), namely {found}; give "
            f"another folder"
        )
    return True


def _digest(root: Path, card: str) -> str:
    sha = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path != root / card and path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        sha.update(f"{path.relative_to(root).as_posix()} {content}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()


def _throw_away(root: Path) -> None:
    doomed = root.with_name(f".{root.name}.damaged-{secrets.token_hex(4)}")
    root.rename(doomed)  # at once: another run may look meanwhile
    shutil.rmtree(doomed, ignore_errors=True)
