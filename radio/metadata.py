"""The schema of a checkpoint's metadata, so that readers can rely on its types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le, MaxLen
from pydantic import AfterValidator, TypeAdapter
from typing_extensions import TypedDict

from .errors import CheckpointError, shown
from .io import MAX_METADATA_BYTES, parse_json, validate

FORMAT = "am-radio/1"

_MAX_TEACHERS = 256


def _one_path(text: str) -> str:
    if "\0" in text:
        raise ValueError("cannot be a path, it holds a NUL")
    return text


Side = Annotated[int, Ge(1), Le(16_384)]  # pixels
Sides = Annotated[list[Side], MaxLen(2)]
Name = Annotated[str, MaxLen(4096)]
Place = Annotated[str, MaxLen(4096), AfterValidator(_one_path)]


class TeacherEntry(TypedDict, extra_items=Any):  # type: ignore[call-arg]
    """A teacher that a student learned from."""

    name: Name  # name of its adaptor
    model: NotRequired[Place]  # model spec, such as dinov2:vitb14@FILE
    fingerprint: NotRequired[Name]
    resolution: NotRequired[Side | Sides | None]
    student_resolution: NotRequired[Side | Sides | None]


Teachers = Annotated[list[TeacherEntry], MaxLen(_MAX_TEACHERS)]


class ModelEntry(TypedDict, extra_items=Any):  # type: ignore[call-arg]
    """A `ModelConfig` as plain data; `from_plain` checks its fields."""

    adaptors: NotRequired[Annotated[list[Any], MaxLen(_MAX_TEACHERS)]]


class SourceEntry(TypedDict, extra_items=Any):  # type: ignore[call-arg]
    """A data set that a student was trained on."""

    path: NotRequired[Place | None]
    fingerprint: NotRequired[Name | None]
    labels_used: NotRequired[bool | None]


class DataEntry(TypedDict, extra_items=Any):  # type: ignore[call-arg]
    """The data that a student was trained on."""

    sources: NotRequired[list[SourceEntry] | None]


class Metadata(TypedDict, extra_items=Any):  # type: ignore[call-arg]
    """The metadata's known keys; other keys are preserved."""

    format: Literal["am-radio/1"]
    name: NotRequired[Name | None]
    model: NotRequired[ModelEntry]
    resolution: NotRequired[Side | None]
    teachers: NotRequired[Teachers | None]
    data: NotRequired[DataEntry | None]


_SCHEMA: TypeAdapter[Metadata] = TypeAdapter(Metadata)
_TEACHERS: TypeAdapter[list[TeacherEntry]] = TypeAdapter(Teachers)


def read_metadata(text: str, path: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint, without the key `format`; unknown keys are preserved.

    Raises:
        CheckpointError: not JSON, another format, or a known key of another type; names the first.
    """
    where = f"{shown(path)}: its metadata"
    if len(text) > MAX_METADATA_BYTES:
        raise CheckpointError(f"{where} has {len(text)} characters; the limit is {MAX_METADATA_BYTES}")
    data = parse_json(text, where, error=CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is a {type(data).__name__}; wanted an object with named values")
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{shown(path)}: not of the format {FORMAT}; write it again with this version")
    validate(_SCHEMA, data, where, error=CheckpointError)
    try:
        json.dumps(data, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be written again ({error}); is it the right file?") from error
    return {key: value for key, value in data.items() if key != "format"}


def teachers_on(metadata: Mapping[str, Any], where: object) -> list[Mapping[str, Any]]:
    """List the teachers that metadata names, each with `name`, `model` (a spec) and `fingerprint`.

    Raises:
        CheckpointError: an entry is of another type, or lacks one of these keys; `where` names the model.
    """
    entries = metadata.get("teachers") or []
    found = validate(
        _TEACHERS, entries, f"{shown(where)}: the teachers in its metadata", error=CheckpointError
    )
    for place, entry in enumerate(found):
        for key in ("model", "fingerprint"):
            if key not in entry:
                raise CheckpointError(
                    f"{shown(where)}: the metadata's teacher {place} ({shown(entry['name'][:80])}) has no "
                    f"{key!r}, so its weights cannot be found again; wanted name, model and fingerprint"
                )
    return list(entries)
