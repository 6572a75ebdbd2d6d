"""Read weights files as data: torch files and safetensors, recognised by content; nothing is executed.

Every weights file is read by this module, whoever wrote it: it must be a regular file, not much larger in
memory than on disk, with plain dense tensors; anything else is one error that states what the file is and
what to do.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import safetensors
import torch
from numpy._core import multiarray
from torch import Tensor, nn

from .errors import CheckpointError, shown
from .io import find_file, has_surrogates

_GROWTH = 4  # limit of memory per byte on disk: several names may share one tensor
_SLACK = 64 << 20  # bytes, for small files of shared tensors
_MAX_CHARS = 1024  # of a name in messages

_DTYPE_NAMES = (  # with one value per element; others pack several, or torch cannot compute with them
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_DTYPES = {getattr(torch, name, None) for name in _DTYPE_NAMES}  # the newest are not in every version

_FOREIGN = (  # first bytes of files mistaken for weights, and what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; get that with: git lfs pull"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"BZh", "compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras); wanted PyTorch's weights or safetensors"),
    (b"GGUF", "a GGUF file (llama.cpp); wanted PyTorch's weights or safetensors"),
    (b"\x93NUMPY", "a NumPy array; wanted PyTorch's weights or safetensors"),
)


class SafeFile(NamedTuple):
    """The content of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def is_safetensors(path: Path) -> bool:
    """Check whether a file begins as safetensors do, or has their suffix and is no zip file."""
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        return False
    size = int.from_bytes(head[:8], "little")
    return path.suffix == ".safetensors" or (size < path.stat().st_size and head[8:9] == b"{")


def read_safetensors(path: Path) -> SafeFile:
    """Read a safetensors file.

    Raises:
        CheckpointError: another kind of file, or an incomplete one.
    """
    _refuse_foreign(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # its own error, or torch's about dtypes that it lacks
        reason = _cut(" ".join(str(error).split()), 200)
        raise CheckpointError(f"{shown(path)}: not a whole safetensors file ({reason})") from error
    return SafeFile(metadata, tensors)


def read_torch(path: Path) -> Any:
    """Read a file written by `torch.save` on the CPU; of a TorchScript archive, its state dict.

    Besides tensors and containers it may contain only records that run no code: NumPy's, paths, times,
    namespaces.

    Raises:
        CheckpointError: another kind of file, a damaged one, or one that refers to other code (it is named).
    """
    size = find_file(path, "weights file")
    _refuse_foreign(path)
    try:
        if _head(path).startswith(b"PK\x03\x04") and _is_torchscript(path, size):
            return read_torchscript(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(_harmless())):
            warnings.simplefilter("ignore")  # torch's about an unusual pickle protocol or kind of tensor
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True)
            with path.open("rb") as file:  # given a path, torch would decide by its suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{shown(path)}: {_explain(str(error))}") from error
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: {error.strerror or 'cannot be read'}") from error
    except Exception as error:  # torch may raise anything on bytes that it did not write
        raise CheckpointError(f"{shown(path)}: not a torch file, or a truncated one") from error


def plain_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that a file's tensors are dense and not too large for its size; return them detached.

    Attributes that a file sets on a parameter are dropped: they would override its methods.

    Raises:
        CheckpointError: a tensor is not dense, the tensors are too large, or a name has lone surrogates;
            names that tensor.
    """
    plain: dict[str, Tensor] = {}
    for name, given in tensors.items():
        if has_surrogates(name):
            raise CheckpointError(
                f"{shown(path)}: the name {_cut(shown(name), 200)} holds half a character; it is damaged"
            )
        tensor = plain[name] = Tensor.detach(given)
        kind = _odd_kind(tensor)
        if kind:
            raise CheckpointError(
                f"{shown(path)}: {_cut(shown(name), 200)} is a {kind} tensor; "
                f"wanted dense ones with their values"
            )
    size = path.stat().st_size
    total = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    if total > _GROWTH * size + _SLACK:
        name = max(plain, key=lambda each: plain[each].numel())
        raise CheckpointError(
            f"{shown(path)}: has {size} bytes, and its tensors would take {total}, the largest "
            f"{_cut(shown(name), 200)} of shape {tuple(plain[name].shape)}; it is damaged, or made "
            f"to fill the memory"
        )
    return plain


def _odd_kind(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    if tensor.is_conj() or tensor.is_neg():
        return "lazily conjugated"
    if tensor.dtype not in _DTYPES:
        return f"packed ({str(tensor.dtype).removeprefix('torch.')})"
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return "" if plain else f"{type(tensor).__name__} (sharded or packed)"


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: {error.strerror or 'cannot be read'}") from error


def _refuse_foreign(path: Path) -> None:
    head = _head(path)
    for start, what in _FOREIGN:
        if head.startswith(start):
            raise CheckpointError(f"{shown(path)}: {what}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{shown(path)}: a web page, not a weights file; download it again")


def _is_torchscript(path: Path, size: int) -> bool:
    """Check whether a zip file is a TorchScript archive; refuse other archives and zip bombs."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > _GROWTH * size + _SLACK:
        raise CheckpointError(
            f"{shown(path)}: has {size} bytes, and unpacked {total}; it is damaged or made to fill the memory"
        )
    names = [member.filename for member in members]
    if any(name.endswith("constants.pkl") for name in names) and any("code/" in name for name in names):
        return True
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{shown(path)}: a NumPy archive (.npz); wanted PyTorch's weights or safetensors"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            f"{shown(path)}: a zip archive, and not a torch file: it has no data.pkl; wanted a state dict"
        )
    return False


def _explain(message: str) -> str:
    """Turn the message of torch's unpickler into advice."""
    match = re.search(r"(?:GLOBAL|Trying to (?:load|call|instantiate)\S*(?: \S+)*?) `?([\w.]+)`? ", message)
    if match is None and "weights_only" not in message and "Unsupported" not in message:
        return "not a torch file, or a damaged one"
    named = f" (it names {match[1]})" if match else ""
    return (
        f"reading it could run code that it carries{named}, or it is no torch file; nothing was run. "
        "Wanted its weights alone, as safetensors: ask who made it for them; in the environment that wrote "
        'it, safetensors.torch.save_file(model.state_dict(), "model.safetensors") makes that file'
    )


def _harmless() -> Iterator[Any]:
    """Yield classes and functions that trainers save beside the weights and that only hold a value."""
    yield from (argparse.Namespace, types.SimpleNamespace, collections.defaultdict, list, dict, set, slice)
    yield from (datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone)
    yield from (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
    yield from (np.dtype, np.ndarray)
    yield from (kind for name in np.dtypes.__all__ if isinstance(kind := getattr(np.dtypes, name), type))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # up to NumPy 1, and from 2 on
        yield multiarray.scalar, f"{module}.scalar"
        yield multiarray._reconstruct, f"{module}._reconstruct"


def _cut(text: str, most: int = _MAX_CHARS) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


_MAX_NODES = 1_000_000  # modules and attributes of one archive
_MAX_MODULE_DEPTH = 100
_STORAGES = {
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
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch.jit._pickle":
            return _first_value  # typed lists and tags: the value itself
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


_first_value: Callable[..., Any] = lambda value, *_: value  # noqa: E731


def _state_dict(root: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    pending, nodes = [("", root, 0)], 0
    while pending:
        prefix, module, depth = pending.pop()
        for name, value in module.attributes.items() if isinstance(module, _Module) else ():
            nodes += 1
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                pending.append((f"{prefix}{name}.", value, depth + 1))
        if nodes > _MAX_NODES or depth > _MAX_MODULE_DEPTH:
            raise ValueError("its modules have no end")
    return dict(sorted(tensors.items()))


# Keys under which trainers store the weights, in the order of the search: of two copies the trained one comes
# first, of a student and its averaged teacher (DINO) the teacher.
_KEYS = (
    *("state_dict", "model", "model_state_dict", "model_state", "module", "network", "net", "weights"),
    "params",
    *("teacher", "state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "student"),
)
_MARKS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # compile, FSDP, checkpoints
_PARALLEL = "module."  # DataParallel
_MAX_DEPTH = 4


def find_state(data: Any, where: object) -> dict[str, Tensor]:
    """Find the state dict in a torch file's content: under a trainer's key, or its only part with tensors.

    The marks of torch.compile, FSDP and (Distributed)DataParallel are removed from the names.

    Raises:
        CheckpointError: it has none, or several; names the keys that it has.
    """
    if isinstance(data, Mapping) and {"metadata", "sha256", "tensors"} <= data.keys():
        raise CheckpointError(
            f"{shown(where)}: a checkpoint of am-radio; give the file alone, without family:"
        )
    for _ in range(_MAX_DEPTH):
        inner = _inner(data)
        if inner is None:
            break
        data = inner
    items = list(data.items()) if isinstance(data, Mapping) else []
    tensors = {name: value for name, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{shown(where)}: holds no tensors; wanted a state dict, or one under {', '.join(_KEYS[:3])} or "
            f"the like; got {_describe(data)}"
        )
    other = next((name for name in tensors if not isinstance(name, str)), None)
    if other is not None:
        raise CheckpointError(
            f"{shown(where)}: its tensors have no names: one stands under {_shown_key(other)} (a "
            f"{type(other).__name__}); wanted a state dict"
        )
    return _unmarked(tensors, where)


def without_prefix(tensors: dict[str, Tensor], anchors: Collection[str], where: object) -> dict[str, Tensor]:
    """Remove a wrapper's prefix of the names, such as `backbone.`, and drop tensors without that prefix.

    Args:
        tensors: a state dict.
        anchors: names that the network has; the prefix is the one that most of them have. If none occurs,
            everything is returned unchanged.
        where: names the file in errors.

    Raises:
        CheckpointError: several prefixes match equally.
    """
    known = frozenset(anchors)
    hits: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                hits["".join(f"{part}." for part in parts[:start])] += 1
    if not hits:
        return tensors
    most = max(hits.values())
    prefixes = [prefix for prefix, count in hits.items() if count == most]
    prefixes = [
        one for one in prefixes if not any(one != other and one.startswith(other) for other in prefixes)
    ]
    if len(prefixes) > 1:  # a student and its averaged copy
        prefixes = [one for one in prefixes if "teacher" in one or "ema" in one] or prefixes
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{shown(where)}: holds these weights more than once, under "
            f"{' and '.join(repr(shown(one[:80])) for one in prefixes[:3])}; write a file with one of them"
        )
    prefix = prefixes[0]
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _inner(data: Any) -> Mapping[Any, Any] | None:
    """Return the mapping under a trainer's key; else, beside no tensors, the only mapping that holds some."""
    if not isinstance(data, Mapping):
        return None
    for key in _KEYS:
        value = data.get(key)
        if isinstance(value, Mapping) and value:
            return value
    if any(isinstance(value, Tensor) for value in data.values()):
        return None
    inner = [value for value in data.values() if isinstance(value, Mapping) and _has_tensors(value)]
    return inner[0] if len(inner) == 1 else None


def _has_tensors(data: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and isinstance(value, Tensor) for name, value in data.items())


def _unmarked(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = name
        for mark in _MARKS:
            plain = plain.replace(mark, "")
        while plain.startswith(_PARALLEL):
            plain = plain.removeprefix(_PARALLEL)
        if plain in renamed:
            raise CheckpointError(
                f"{shown(where)}: two tensors are both {shown(plain[:200])} without wrappings"
            )
        renamed[plain] = value
    return renamed


def _describe(data: Any) -> str:
    if not isinstance(data, Mapping):
        return f"a {type(data).__name__}"
    keys = ", ".join(_shown_key(key) for key in list(data)[:8])
    return f"the keys {keys}{', …' if len(data) > 8 else ''}" if data else "nothing"


def _shown_key(key: Any) -> str:
    """Format a key for a message: a string cut, a small integer, of anything else (maybe huge) its type."""
    if isinstance(key, str):
        return shown(key[:60])
    small = isinstance(key, int) and key.bit_length() < 64
    return str(key) if small else f"a {type(key).__name__}"
