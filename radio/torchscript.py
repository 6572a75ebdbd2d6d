"""Read the state dict of a TorchScript archive (such as OpenAI's CLIP files) without running its code.

An archive holds its modules as a pickle of objects whose classes its own code defines. Here every such class
is replaced by an inert holder of attributes; its tensors are those that `state_dict()` would return.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from .errors import CheckpointError, shown

_MAX_NODES = 1_000_000  # modules and attributes of one archive
_MAX_DEPTH = 100
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read the parameters and buffers of a TorchScript archive under their names.

    Raises:
        CheckpointError: it is damaged, or holds something that cannot be read as data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickled = next(name for name in names if name.endswith("/data.pkl") or name == "data.pkl")
            root = _Objects(archive, pickled.removesuffix("data.pkl")).load()
        return _state_dict(root)
    except Exception as error:  # a damaged pickle or zip file may raise anything
        raise CheckpointError(
            f"{shown(path)}: a TorchScript archive that cannot be read as data ({str(error)[:200]}); write "
            f"its state dict: torch.save(torch.jit.load(F).state_dict(), G)"
        ) from error


@final
class _Module:
    """An object of any class of the archive: its attributes, without code."""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __new__(cls, *_: Any) -> _Module:
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


@final
class _Objects(pickle.Unpickler):
    """An unpickler of inert holders and tensors only: no name in a file resolves to a real class."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch.jit._pickle":
            return _first  # typed lists and tags: the value itself
        return _Module

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if len(flat) != count:
                raise ValueError(f"storage {key} has {len(flat)} values instead of {count}")
            self._storages[key] = flat
        return self._storages[key]


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


_first: Callable[..., Any] = lambda value, *_: value  # noqa: E731


def _state_dict(root: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    pending = [("", root, 0)]
    nodes = 0
    while pending:
        prefix, module, depth = pending.pop()
        for name, value in module.attributes.items() if isinstance(module, _Module) else ():
            nodes += 1
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                pending.append((f"{prefix}{name}.", value, depth + 1))
        if nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError("its modules have no end")
    return dict(sorted(found.items()))
