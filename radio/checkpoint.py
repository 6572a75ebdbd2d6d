"""The schema of a checkpoint's metadata, so that readers can rely on its types."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import safetensors.torch
import torch
from annotated_types import Ge, Le, MaxLen
from pydantic import AfterValidator, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from .archive import (
    find_state,
    is_safetensors,
    plain_tensors,
    read_safetensors,
    read_torch,
    without_prefix,
)
from .errors import CheckpointError, shown
from .io import MAX_METADATA_BYTES, find_file, has_surrogates, parse_json, validate, write_bytes

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
    summary_weight: NotRequired[float]  # of its summaries in the loss


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
    """List the teachers that metadata names, each with `name`, and `model` (a spec) and `fingerprint`.

    What others released names no weights: its entries have no fingerprint, and maybe no model.

    Raises:
        CheckpointError: an entry is of another type; `where` names the model.
    """
    entries = metadata.get("teachers") or []
    entries = validate(
        _TEACHERS, entries, f"{shown(where)}: the teachers in its metadata", error=CheckpointError
    )
    return list(entries)


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]  # architecture, adaptors, teachers, settings, provenance
    sha256: str  # of metadata and tensors


def digest(tensors: Mapping[str, Tensor], description: str = "") -> str:
    """Compute a sha256 (hex) of named tensors (dtypes, shapes and bytes) and of a description."""
    sha = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write a checkpoint atomically, as `.pt` or `.safetensors` by its suffix; return its sha256.

    Raises:
        CheckpointError: another suffix.
    """
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    sha = digest(kept, text)
    if path.suffix == ".safetensors":
        data: bytes | memoryview = _in_order(
            safetensors.torch.save(kept, metadata={"metadata": text, "sha256": sha})
        )
    elif path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save({"metadata": text, "sha256": sha, "tensors": kept}, buffer)
        data = buffer.getbuffer()
    else:
        raise CheckpointError(f"{shown(path)}: a checkpoint ends in .pt or .safetensors; name it so")
    write_bytes(path, data)
    return sha


def load(path: Path) -> Checkpoint:
    """Load the checkpoint in a file, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, a foreign or truncated one, or one whose content was altered.
    """
    find_file(path, "checkpoint file")
    text, sha, stored = _read_safetensors(path) if is_safetensors(path) else _read_archive(path)
    tensors = plain_tensors(path, stored)
    if has_surrogates(text):
        raise CheckpointError(f"{shown(path)}: its metadata holds half a character; it is damaged")
    if digest(tensors, text) != sha:
        raise CheckpointError(
            f"{shown(path)}: its content does not match its sha256; it was altered, copy it again"
        )
    return Checkpoint(tensors, read_metadata(text, path), sha)


def load_tensors(path: Path, anchors: Collection[str] = ()) -> dict[str, Tensor]:
    """Load the state dict in a foreign weights file (`.pt`, `.pth`, `.bin`, `.safetensors`, TorchScript).

    Nothing in it is executed. Trainers' wrappings around it are removed (`find_state`), and, if `anchors`
    names weights of the network, a prefix before the names too (`without_prefix`).

    Raises:
        CheckpointError: no such file, not a weights file, or one that would run code when read.
    """
    find_file(path, "weights file")
    state = find_state(read_safetensors(path).tensors if is_safetensors(path) else read_torch(path), path)
    return plain_tensors(path, without_prefix(state, anchors, path))


def load_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a module, strictly; `source` names it in errors. Works on meta modules.

    Raises:
        CheckpointError: keys, shapes or dtype kinds differ, or values are not finite; lists the first ones.
    """
    check_state(module, tensors, source)
    check_finite(tensors, source)
    meta = any(parameter.is_meta for parameter in module.parameters())
    if meta:  # assigns the tensors themselves, whatever their dtype
        expected = module.state_dict()
        tensors = {
            name: tensor if tensor.is_floating_point() else tensor.to(expected[name].dtype)
            for name, tensor in tensors.items()
        }
    module.load_state_dict(dict(tensors), strict=True, assign=meta)


def check_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that a state dict fits a module, ignoring values: the module may be on the meta device.

    Raises:
        CheckpointError: keys, shapes or dtype kinds differ; lists the first missing, unexpected and
            mismatched ones.
    """
    expected = module.state_dict()
    refuse_mismatch(
        source,
        missing=[name for name in expected if name not in tensors],
        unexpected=[name for name in tensors if name not in expected],
        misshapen=[
            (name, tensor.shape, expected[name].shape)
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
        other_kinds=[
            f"{_cut(name)} {_kind(tensor)} instead of {_kind(expected[name])}"
            for name, tensor in tensors.items()
            if name in expected and not _converts(tensor, expected[name])
        ],
    )


def refuse_mismatch(
    source: str,
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    misshapen: Sequence[tuple[str, Sequence[int], Sequence[int]]] = (),
    other_kinds: Sequence[str] = (),
) -> None:
    """Check that all lists of a state dict's differences from a network are empty.

    Args:
        source: names the state dict.
        missing: names that it lacks.
        unexpected: names that the network lacks.
        misshapen: names with the shape that came and the one that was wanted.
        other_kinds: names with what came and what was wanted.

    Raises:
        CheckpointError: one is not empty; lists the first ones of each.
    """
    shapes = [f"{_cut(name)} {tuple(came)} instead of {tuple(wanted)}" for name, came, wanted in misshapen]
    problems = [
        list_first("missing", missing),
        list_first("unexpected", unexpected),
        list_first("misshapen", shapes),
        list_first("of another kind", other_kinds),
    ]
    summary = "; ".join(problem for problem in problems if problem)
    if summary:
        raise CheckpointError(f"{source}: these are not the weights of this architecture: {summary}")


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that no tensor holds NaN or an infinity.

    Raises:
        CheckpointError: one does; gives their number and names the first.
    """
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{source}: {len(broken)} of its {len(tensors)} tensors hold NaN or infinities, the first is "
            f"{_cut(broken[0])}; its training diverged: take an earlier state"
        )


def _converts(tensor: Tensor, expected: Tensor) -> bool:
    """Check whether values keep their meaning: packed integers are no weights, counters may be floats."""
    if tensor.is_complex() or expected.is_complex():
        return tensor.dtype == expected.dtype
    return tensor.is_floating_point() or not expected.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())


def _cut(name: str, most: int = 200) -> str:
    name = shown(name)
    return name if len(name) <= most else f"{name[:most]}…"


def list_first(what: str, names: Sequence[str], most: int = 3) -> str:
    """Format the first names for a message, as in `missing: a, b, c and 5 more`; empty without names."""
    if not names:
        return ""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(map(_cut, names[:most]))}{rest}"


def _in_order(data: bytes) -> bytes:
    """Sort a safetensors file's header, whose metadata are written in the order of a hash map."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _read_safetensors(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    metadata, tensors = read_safetensors(path)
    if "metadata" not in metadata or "sha256" not in metadata:
        raise CheckpointError(
            f"{shown(path)}: holds tensors but no am-radio metadata; it was not written by this trainer"
        )
    return metadata["metadata"], metadata["sha256"], tensors


def _read_archive(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    data = read_torch(path)
    match data:
        case {"metadata": str(text), "sha256": str(sha), "tensors": dict(tensors)} if _is_state(tensors):
            return text, sha, tensors
    raise CheckpointError(
        f"{shown(path)}: a torch file, but not an am-radio checkpoint; for other people's weights name their "
        f"family, as in dinov2:vitb14@{shown(path)}"
    )


def _is_state(tensors: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items())
