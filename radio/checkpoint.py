"""One file that is a model: tensors and a JSON card, hashed, written whole or not at all.

`.pt` files are torch archives of `{"card": str, "sha256": str, "tensors": dict}`; `.safetensors`
files keep card and hash in their metadata. Both are read without running any pickled code.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import CheckpointError
from .io import write_bytes

FORMAT = "am-radio/1"


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]
    card: dict[str, Any]  # architecture, adaptors, teachers, settings, provenance
    sha256: str  # of card and tensors


def digest(tensors: Mapping[str, Tensor], description: str = "") -> str:
    """A sha256 (hex) of named tensors, their types, shapes and bytes, and of a description."""
    sha = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Write a checkpoint atomically, as `.pt` or `.safetensors` by its ending; its sha256.

    Raises:
        CheckpointError: another ending.
    """
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **card}, sort_keys=True)
    sha = digest(kept, text)
    if path.suffix == ".safetensors":
        data: bytes | memoryview = _in_order(
            safetensors.torch.save(kept, metadata={"card": text, "sha256": sha})
        )
    elif path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save({"card": text, "sha256": sha, "tensors": kept}, buffer)
        data = buffer.getbuffer()
    else:
        raise CheckpointError(f"{path}: a checkpoint ends in .pt or .safetensors; name it so")
    write_bytes(path, data)
    return sha


def load(path: Path) -> Checkpoint:
    """The checkpoint in a file, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, a foreign or truncated one, or one whose content was altered.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        text, sha, tensors = _read_safetensors(path)
    else:
        text, sha, tensors = _read_archive(path)
    if digest(tensors, text) != sha:
        raise CheckpointError(f"{path}: its content does not match its sha256; it was altered, copy it again")
    card = json.loads(text)
    if card.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: not of the format {FORMAT}; write it again with this version")
    return Checkpoint(tensors, card, sha)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in somebody else's weights file (`.pt`, `.pth`, `.bin`, `.safetensors`).

    Nothing in it is executed. A state dict under the key `state_dict` or `model` is unwrapped.

    Raises:
        CheckpointError: no such file, not a weights file, or one that would run code when read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    data = _read_pickle(path)
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    items = data.items() if isinstance(data, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; wanted a state dict")
    return tensors


def load_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a module, strictly; `source` names it in errors. Works on meta modules.

    Raises:
        CheckpointError: keys or shapes differ; lists the first missing, unexpected and misshapen ones.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [
        _first("missing", [name for name in wanted if name not in given]),
        _first("unexpected", [name for name in given if name not in wanted]),
        _first(
            "misshapen",
            [
                f"{name} {given[name]} instead of {wanted[name]}"
                for name in wanted
                if name in given and given[name] != wanted[name]
            ],
        ),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise CheckpointError(f"{source}: these are not the weights of this architecture: {found}")
    module.load_state_dict(dict(tensors), strict=True, assign=_is_meta(module))


def _is_meta(module: torch.nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _first(what: str, names: list[str], most: int = 3) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{rest}"


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its header sorted: metadata come out in the order of a hash map."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _read_safetensors(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    if "card" not in metadata or "sha256" not in metadata:
        raise CheckpointError(
            f"{path}: holds tensors but no am-radio card; it was not written by this trainer"
        )
    return metadata["card"], metadata["sha256"], tensors


def _read_archive(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    data = _read_pickle(path)
    match data:
        case {"card": str(text), "sha256": str(sha), "tensors": dict(tensors)} if _is_state(tensors):
            return text, sha, tensors
    raise CheckpointError(
        f"{path}: a torch file, but not an am-radio checkpoint; for other people's weights name their "
        f"family, as in dinov2:vitb14@{path}"
    )


def _is_state(tensors: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items())


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of an unusual pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: reading it could run code that it carries, or it is no torch file; nothing was run"
            ) from error
        raise CheckpointError(f"{path}: not a torch file, or a damaged one") from error
    # What torch's unpickler meets in bytes that are none of its own, besides what it says itself.
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, struct.error) as error:
        raise CheckpointError(f"{path}: not a torch file, or a truncated one") from error
