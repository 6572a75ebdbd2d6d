"""Validation of language models' files: only a model whose own files hold all its weights is accepted.

transformers and gguf trust a folder: a `config.json` may request terabytes, code of its own, a quantisation
library or another folder; a GGUF header may hold counts up to 2**60. All of that is refused here, before
either library reads a byte, and any other error they raise becomes one error that names the folder.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import TypedDict

from radio.errors import CheckpointError, MissingExtraError, RadioError, require, shown
from radio.io import parse_json, read_json, read_text, validate

_MAX_JSON_BYTES = 512 << 20  # the largest published tokenizer.json has about 35 MB
_MAX_NUMBER = 2**31
_MAX_REPEATS = 4096  # layers, blocks, experts, labels: each becomes a Python object before any tensor
_REPEATS = re.compile(r"layer|block_count|depth|expert|labels", re.IGNORECASE)
_SHARES = re.compile(r"dropout|pdrop", re.IGNORECASE)  # dropout rates, in [0, 1)
_WHOLE = ("F64", "F32", "F16", "BF16")  # smaller types are quantised, and meaningless without their scales
_ATTENTION = (None, "eager", "sdpa")  # other names download kernels
_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


class _Index(TypedDict):
    """The index of a sharded checkpoint: the file of each weight."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


_INDEX = TypeAdapter(_Index)
_OBJECT = TypeAdapter(dict[str, Any])


def check_folder(folder: Path) -> Any:
    """Check a Hugging Face folder; return its configuration.

    Raises:
        CheckpointError: its files do not hold all weights of a model, or the model needs code of its own.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja", ".safetensors", ".bin"):
            _check_regular(path)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: holds an adapter (PEFT), not a model; merge it into its model first"
        )
    for name in _JSON_FILES:
        path = folder / name
        if path.exists():
            text = read_text(path, limit=_MAX_JSON_BYTES, error=CheckpointError)
            data = parse_json(text, path, error=CheckpointError, constants=True)
            validate(_OBJECT, data, path, error=CheckpointError)
            if name == "config.json":
                _check_config(data, path)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: has no config.json; name the folder of one Hugging Face model")
    size = sum(path.stat().st_size for path in _weights(folder))
    return _check_size(folder, None, size)


def check_weights(folder: Path) -> None:
    """Check that a folder's weights are floats of 16 bits or more, that is, not quantised.

    Raises:
        CheckpointError: some are not; transformers would read their codes as values.
    """
    for path in _weights(folder):
        with one_error(str(path), "holds no weights that transformers reads"):
            kinds = _kinds(path)
        for name, kind in kinds.items():
            if name.endswith((".weight", ".bias")) and kind not in _WHOLE:
                raise CheckpointError(
                    f"{path}: {shown(name[:200])} is of the type {kind}, as quantised weights are; wanted "
                    f"{', '.join(_WHOLE)}: get the model as it was before it was quantised"
                )


def _kinds(path: Path) -> dict[str, str]:
    """Read the types of a file's tensors, in safetensors' spelling."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    named = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        name: named.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        for name, tensor in held.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


def check_gguf(path: Path) -> Any:
    """Check a GGUF file; return the configuration in it.

    Raises:
        CheckpointError: not a GGUF file, truncated, or with fewer weights than its model has.
        MissingExtraError: gguf is not installed.
    """
    sizes: Any = require("gguf.constants", extra="vqa").GGML_QUANT_SIZES
    _check_regular(path)
    if not path.stat().st_size:
        raise CheckpointError(f"{path}: is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_header(_Cursor(data, path), {int(kind): size for kind, size in sizes.items()})
    return _check_size(path.parent, path.name, 4 * path.stat().st_size)  # a weight takes 2 bits or more


@contextmanager
def one_error(name: str, what: str) -> Iterator[None]:
    """Turn whatever transformers, tokenizers or gguf raise inside into one error that names the model.

    Raises:
        CheckpointError: any other exception.
        MissingExtraError: a library is not installed.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader always prints a progress bar
            yield
    except (RadioError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        raise MissingExtraError(
            f'{name}: {_reason(error)}; get what is missing with: pip install "am-radio[vqa]"'
        ) from error
    except BaseException as error:  # tokenizers' panics are not an Exception
        raise CheckpointError(f"{name}: {what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """Format an exception on one line, without addresses that differ between runs."""
    said = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", " ".join(str(error).split()))
    return f"{type(error).__name__}: {shown(said[:300])}"


def _check_regular(path: Path) -> None:
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not is_regular:  # opening a pipe would wait for ever
        raise CheckpointError(f"{path}: is no regular file; give a folder of one Hugging Face model")


def _check_config(config: dict[str, Any], path: Path) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("quantization_config") is not None:
            raise CheckpointError(
                f"{path}: has a quantization_config, which would load another library; name the folder of "
                f"the model as it was before"
            )
        for key in ("attn_implementation", "_attn_implementation"):
            if part.get(key) not in _ATTENTION:
                raise CheckpointError(f"{path}: {key} is {shown(part[key])!r:.80}; wanted eager or sdpa")
        for key, value in part.items():
            _check_number(key, value, path)


def _check_number(key: str, value: Any, path: Path) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    most = _MAX_REPEATS if _REPEATS.search(key) else _MAX_NUMBER
    if not math.isfinite(value) or (_SHARES.search(key) and not 0 <= value < 1):
        raise CheckpointError(f"{path}: {shown(key[:80])} is {value}, which cannot be; get the file again")
    if isinstance(value, int) and abs(value) > most:
        told = str(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"
        raise CheckpointError(f"{path}: {shown(key[:80])} is {told}; no language model has more than {most}")


def _weights(folder: Path) -> list[Path]:
    """Find the files with a folder's weights.

    Raises:
        CheckpointError: no weights, or an index that names absent files.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return [folder / single]
        if index.exists():
            names = sorted(set(_read_index(index)))
            absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
            if absent or not names:
                what = f"names {shown(absent[0][:80])}, which is not in the folder" if absent else "is empty"
                raise CheckpointError(f"{index}: {what}; get the whole model")
            return [folder / name for name in names]
    raise CheckpointError(f"{folder}: holds no weights; wanted model.safetensors, or its parts and index")


def _read_index(path: Path) -> list[str]:
    data = read_json(path, _OBJECT, error=CheckpointError)
    return list(validate(_INDEX, data, path, error=CheckpointError)["weight_map"].values())


def _check_size(folder: Path, gguf: str | None, most: int) -> Any:
    """Check that the model, built on the meta device, has at most `most` weights; return its config."""
    name = str(folder / gguf) if gguf else str(folder)
    options = {"gguf_file": gguf} if gguf else {}
    with one_error(name, "is no language model that transformers reads"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    if getattr(network, "model", None) is None or getattr(network, "lm_head", None) is None:
        raise CheckpointError(
            f"{name}: is a {type(network).__name__}; wanted a language model built as Llama is (model, "
            f"lm_head), such as Vicuna, Qwen or SmolLM2"
        )
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > most:
        raise CheckpointError(
            f"{name}: describes a model of {count} weights, and its files hold {most} at most; they do not "
            f"belong together"
        )
    return config


@final
class _Cursor:
    """Reads a GGUF header value by value, never beyond the file's end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._length, self.at = data, path, len(data), 0

    def fail(self, problem: str) -> CheckpointError:
        """Return the error about this file and position."""
        return CheckpointError(f"{self._path}: {problem} (at byte {self.at} of {self._length})")

    def take(self, layout: str) -> Any:
        """Read one number of this struct layout."""
        start = self.skip(struct.calcsize(layout))
        return struct.unpack_from(f"<{layout}", self._data, start)[0]

    def skip(self, size: int) -> int:
        """Skip `size` bytes; return where they begin."""
        start = self.at
        if size > self._length - start:
            raise self.fail(f"ends early or is damaged: {size} bytes are due")
        self.at = start + size
        return start

    def text(self) -> str:
        """Read a string."""
        size = self.take("Q")
        start = self.skip(size)
        return bytes(self._data[start : start + size]).decode("utf-8", "replace")

    def count(self, least: int) -> int:
        """Read the number of entries that follow, each of at least `least` bytes."""
        found = int(self.take("Q"))
        if found * least > self._length - self.at:
            raise self.fail(f"is said to hold {found} entries, more than fit; it is cut off or damaged")
        return found

    def left(self) -> int:
        """Return the number of bytes up to the end."""
        return self._length - self.at


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def _check_header(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> None:
    if bytes(cursor._data[:4]) != b"GGUF":
        raise cursor.fail("is no GGUF file")
    cursor.skip(4)
    version = cursor.take("I")
    if version not in (2, 3):
        raise cursor.fail(f"is of GGUF's version {version}; wanted 2 or 3")
    num_tensors, num_values = cursor.count(24), cursor.count(13)
    alignment = 32
    for _ in range(num_values):
        key = cursor.text()
        value = _read_value(cursor, cursor.take("I"))
        if key == "general.alignment":
            alignment = value if isinstance(value, int) else 0
        _check_number(key, value, cursor._path)
    if not 0 < alignment <= 1 << 20:
        raise cursor.fail(f"has an alignment of {alignment}")
    ends = [_check_tensor(cursor, sizes) for _ in range(num_tensors)]
    cursor.skip(min(-cursor.at % alignment, cursor.left()))
    if max(ends, default=0) > cursor.left():
        raise cursor.fail(f"is cut off: its weights take {max(ends)} bytes, and {cursor.left()} are there")


def _read_value(cursor: _Cursor, kind: int, depth: int = 0) -> Any:
    """Read a number, or skip a string or an array and return None."""
    if kind in _NUMBERS:
        return cursor.take(_NUMBERS[kind])
    if kind == _TEXT:
        cursor.skip(cursor.take("Q"))
        return None
    if kind != _ARRAY or depth > 3:
        raise cursor.fail(f"holds a value of the unknown type {kind}, or arrays nested too deeply")
    inner = cursor.take("I")
    if inner in _NUMBERS:
        size = struct.calcsize(_NUMBERS[inner])
        cursor.skip(size * cursor.count(size))
        return None
    for _ in range(cursor.count(8)):
        _read_value(cursor, inner, depth + 1)
    return None


def _check_tensor(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> int:
    """Check a tensor's header; return the offset of its end from the start of the weights."""
    name = shown(cursor.text()[:80])
    dimensions = cursor.take("I")
    if dimensions > 4:
        raise cursor.fail(f"the tensor {name} has {dimensions} dimensions")
    count = math.prod(cursor.take("Q") for _ in range(dimensions))
    kind = cursor.take("I")
    if kind not in sizes:
        raise cursor.fail(f"the tensor {name} is of the unknown type {kind}")
    block, size = sizes[kind]
    offset: int = cursor.take("Q")
    end: int = offset + count * size // block
    return end
