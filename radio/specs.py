"""Model specs: one string that names any backbone; what can be said about them without torch.

`runs/x/ckpt.pt` is a checkpoint; `family:name[@file]`, `hf:folder` and `radio:file` are teachers;
`arch:name`, or a plain architecture name with `random_init`, is an untrained student. `timm:name` is an
architecture, `timm:name@file` a teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from .errors import CheckpointError, ConfigError, did_you_mean
from .io import find_file
from .students import students
from .teachers import families

_MAX_CHARS = 200  # characters of a spec in messages


class Spec(NamedTuple):
    """A parsed `family:name[@file]`."""

    family: str
    name: str
    file: Path | None


def parse(text: str) -> Spec:
    """Parse `family:name[@file]`.

    Raises:
        ConfigError: no such family, or no name.
    """
    family, _, rest = text.partition(":")
    name, at, file = rest.partition("@")
    if family != "arch" and family not in families:
        families[family]  # raises, with the nearest names
    if not name or (at and not file):
        raise ConfigError(
            f"{text[:_MAX_CHARS]!r} is not a whole model spec; wanted {family}:NAME or {family}:NAME@FILE"
        )
    return Spec(family, name, Path(file) if file else None)


def check_spec(text: str, *, random_init: bool = False) -> Literal["checkpoint", "architecture", "teacher"]:
    """Check that a spec can name a model, and return of which kind.

    Raises:
        ConfigError: an unknown name; suggests the nearest. Or a kind that does not go with `random_init`.
        CheckpointError: no such file.
    """
    path = Path(text)
    try:
        exists = path.is_file()
    except OSError:  # a name that is too long
        exists = False
    if exists or (path.suffix in (".pt", ".safetensors") and ":" not in text):
        find_file(path, "checkpoint file")
        return "checkpoint"
    if text.startswith("arch:"):
        spec = parse(text)
        if spec.file is not None:
            raise ConfigError(
                f"{text}: arch: is for untrained students and takes no file; give the file alone"
            )
        if spec.name not in students:
            students[spec.name]  # raises, with the nearest names
        return "architecture"
    if text in students:
        if not random_init:
            raise ConfigError(
                f"{text} is an architecture and has no weights; give a checkpoint, or --random-init to take "
                f"it untrained"
            )
        return "architecture"
    if ":" not in text:
        hint = did_you_mean(text, students) or f"; known architectures: {', '.join(students)}"
        raise CheckpointError(f"{text[:_MAX_CHARS]!r} is no file and no architecture{hint}")
    if random_init:
        raise ConfigError(
            f"{text} is a teacher, and teachers are not scored untrained; leave --random-init out"
        )
    parse(text)
    return "teacher"
