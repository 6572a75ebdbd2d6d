"""Checkpoint files: tensors and JSON metadata, hashed, written atomically.

`.pt` files are torch archives of `{"metadata": str, "sha256": str, "tensors": dict}`; `.safetensors` files
hold metadata and hash in their header's metadata. Both are read without running any pickled code.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from .archive import find_file, is_safetensors, plain_tensors, read_safetensors, read_torch
from .errors import CheckpointError, shown
from .io import has_surrogates, write_bytes
from .metadata import FORMAT, read_metadata
from .wrappings import find_state, without_prefix


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
    text, sha, found = _read_safetensors(path) if is_safetensors(path) else _read_archive(path)
    tensors = plain_tensors(path, found)
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
    found = find_state(read_safetensors(path).tensors if is_safetensors(path) else read_torch(path), path)
    return plain_tensors(path, without_prefix(found, anchors, path))


def load_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a module, strictly; `source` names it in errors. Works on meta modules.

    Raises:
        CheckpointError: keys, shapes or dtype kinds differ, or values are not finite; lists the first ones.
    """
    check_state(module, tensors, source)
    check_finite(tensors, source)
    meta = _is_meta(module)
    if meta:  # assigns the tensors themselves, whatever their dtype
        wanted = module.state_dict()
        tensors = {
            name: tensor if tensor.is_floating_point() else tensor.to(wanted[name].dtype)
            for name, tensor in tensors.items()
        }
    module.load_state_dict(dict(tensors), strict=True, assign=meta)


def check_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that a state dict fits a module, ignoring values: the module may be on the meta device.

    Raises:
        CheckpointError: keys, shapes or dtype kinds differ; lists the first missing, unexpected and
            mismatched ones.
    """
    wanted = module.state_dict()
    problems = [
        _first("missing", [name for name in wanted if name not in tensors]),
        _first("unexpected", [name for name in tensors if name not in wanted]),
        _first(
            "misshapen",
            [
                f"{_cut(name)} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
                for name, tensor in tensors.items()
                if name in wanted and tensor.shape != wanted[name].shape
            ],
        ),
        _first(
            "of another kind",
            [
                f"{_cut(name)} {_kind(tensor)} instead of {_kind(wanted[name])}"
                for name, tensor in tensors.items()
                if name in wanted and not _converts(tensor, wanted[name])
            ],
        ),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise CheckpointError(f"{source}: these are not the weights of this architecture: {found}")


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


def _converts(tensor: Tensor, wanted: Tensor) -> bool:
    """Check whether values keep their meaning: packed integers are no weights, counters may be floats."""
    if tensor.is_complex() or wanted.is_complex():
        return tensor.dtype == wanted.dtype
    return tensor.is_floating_point() or not wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())


def _cut(name: str, most: int = 200) -> str:
    name = shown(name)
    return name if len(name) <= most else f"{name[:most]}…"


def _is_meta(module: torch.nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _first(what: str, names: list[str], most: int = 3) -> str:
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
