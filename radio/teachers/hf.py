"""Local Hugging Face folders as teachers: `hf:FOLDER`, run by transformers' own networks.

A folder holds `config.json`, safetensors (one file, or several with an index), `preprocessor_config.json`
and, for texts, a tokenizer. Nothing else is read: no other format of weights, no code, nothing from the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, NotRequired, final

import torch
from annotated_types import Gt, Len
from pydantic import TypeAdapter
from torch import Tensor, nn
from typing_extensions import TypedDict

from ..checkpoint import Side, check_finite, load_tensors, refuse_mismatch
from ..errors import CheckpointError, ConfigError, MissingExtraError, RadioError, did_you_mean, require, shown
from ..io import read_bytes, read_json, validate
from ..types import Teacher
from . import families
from .base import ClipText, Frozen
from .hf_trunks import KINDS, PROJECTED, HfKind, HfTrunk

# Letters: N texts, L text length, C their width.

_MAX_NUMBER = 1 << 20  # widths, vocabularies, token ids
_MAX_LAYERS = 1024
_MAX_TOKENIZER_BYTES = 512 << 20  # the largest published tokenizer.json has about 35 MB
_IDENTITY = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std that change nothing
_SPARE_WEIGHTS = 1 << 20  # that a configuration may describe beyond twice those in the files
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
# Keys of config.json that say how to run a model (whose code, which kernels), not what it is: left out.
_HOW_TO_RUN = (
    *("transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype"),
    *("auto_map", "attn_implementation", "_attn_implementation", "fusion_config", "transformers_weights"),
    *("output_hidden_states", "output_attentions", "return_dict", "tie_last_hidden_states"),
)


class _Index(TypedDict, extra_items=Any):  # type: ignore[call-arg]
    """`model.safetensors.index.json`: the file of each weight."""

    weight_map: dict[str, str]


class _Size(TypedDict, total=False):
    """The size of an image, in pixels."""

    height: Side
    width: Side
    shortest_edge: Side
    longest_edge: Side


_Channels = Annotated[list[float], Len(3, 3)]


class _Preprocessor(TypedDict, extra_items=Any):  # type: ignore[call-arg]
    """The keys of `preprocessor_config.json` that determine what a network gets; others are ignored."""

    do_rescale: NotRequired[bool | None]
    rescale_factor: NotRequired[float | None]
    do_normalize: NotRequired[bool | None]
    image_mean: NotRequired[_Channels | None]
    image_std: NotRequired[Annotated[list[Annotated[float, Gt(0)]], Len(3, 3)] | None]
    size: NotRequired[Side | _Size | None]
    do_center_crop: NotRequired[bool | None]
    crop_size: NotRequired[Side | _Size | None]
    do_pad: NotRequired[bool | None]
    pad_size: NotRequired[Side | _Size | None]
    max_num_patches: NotRequired[Annotated[int, Gt(0)] | None]


_OBJECT = TypeAdapter(dict[str, Any])
_INDEX: TypeAdapter[_Index] = TypeAdapter(_Index)
_PREPROCESSOR: TypeAdapter[_Preprocessor] = TypeAdapter(_Preprocessor)


@families.register("hf")
def hf(name: str, file: Path | None, *, meta: bool = False) -> Teacher:
    """Load the image encoder, and the text encoder if there is one, of a local Hugging Face folder.

    Its tokens are the patch tokens after the last block and the final norm, of a SAM those before the neck.
    Its summary is the class token after that norm, of CLIP the projected one, of SigLIP the pooled vector, of
    RADIO its class tokens concatenated, and of a SAM the mean of the tokens.

    Raises:
        ConfigError: a model type that cannot be a teacher.
        CheckpointError: no such folder, a file in it that is absent, damaged or another model's, or weights
            that are not safetensors.
        MissingExtraError: transformers is not installed.
    """
    folder = Path(name if file is None else f"{name}@{file}")  # a path may hold an @
    if not folder.is_dir():
        raise CheckpointError(
            f"{shown(folder)}: no such folder; wanted hf:FOLDER, a local Hugging Face folder"
        )
    library = load_transformers()
    data = _read_config(folder)
    kind = KINDS[data["model_type"]]
    if kind.network == "CLIPVisionModel" and data.get("architectures") == [PROJECTED.network]:
        kind = PROJECTED
    preprocessor = _read_preprocessor(folder)
    network = _build(library, kind, data, folder)
    if not meta:
        network = _load(network, kind, folder)
    with _one_error(folder, "cannot be a teacher"):
        trunk = kind.trunk(network)
    mean, std, native = _find_input(preprocessor, kind, trunk, folder)
    return Frozen(
        trunk=trunk,
        name=f"hf:{folder.absolute().name}",
        identity=f"hf:{data['model_type']}",
        mean=mean,
        std=std,
        native_size=native,
        patch_size=trunk.patch_size,
        fixed_size=trunk.fixed_size,
        summary_dim=trunk.summary_dim,
        token_dim=trunk.token_dim,
        text=_make_text(network, data, folder) if kind.has_text else None,
        variant=json.dumps(data, sort_keys=True),  # heads, activations and the like, which no weight shows
    )


def load_transformers() -> ModuleType:
    """Import transformers, and limit what it prints to errors.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads conflict with our loaders' forks
    library = require("transformers", extra="hf")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def _read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, without what would load code or kernels; check its model type and numbers."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{shown(folder)}: has no config.json; wanted the folder of one Hugging Face model"
        )
    try:
        data: dict[str, Any] = _plain(read_json(path, _OBJECT, error=CheckpointError), path)
    except RecursionError as error:
        raise CheckpointError(f"{shown(path)}: is nested too deeply; is it the right file?") from error
    if data.get("architectures") == ["RADIOModel"] and "hidden_size" not in data:  # transformers': RadioModel
        raise ConfigError(
            f"{shown(folder)}: a RADIO release in NVIDIA's own layout; take radio:{shown(folder)}"
        )
    name = data.get("model_type")
    if not isinstance(name, str) or name not in KINDS:
        hint = did_you_mean(name, KINDS) if isinstance(name, str) else ""
        raise ConfigError(
            f"{shown(path)}: its model_type {shown(repr(name)[:80])} cannot be a teacher{hint}; "
            f"known: {', '.join(KINDS)}"
        )
    return data


def _plain(value: Any, path: Path, key: str = "") -> Any:
    """Copy a part of config.json without the keys in `_HOW_TO_RUN`; refuse quantisation and odd numbers."""
    if isinstance(value, dict):
        if value.get("quantization_config") is not None:
            raise CheckpointError(
                f"{shown(path)}: has a quantization_config; wanted the model as it was before quantisation"
            )
        return {name: _plain(part, path, name) for name, part in value.items() if name not in _HOW_TO_RUN}
    if isinstance(value, list):
        return [_plain(part, path, key) for part in value]
    most = _MAX_LAYERS if re.search("layers|depth|blocks|stages", key) else _MAX_NUMBER
    if isinstance(value, int) and abs(value) > most:
        raise CheckpointError(
            f"{shown(path)}: {shown(key[:80])} is {str(value)[:40]}; no model has more than {most}"
        )
    if isinstance(value, int) and key.endswith("heads") and value < 1:
        raise CheckpointError(f"{shown(path)}: {shown(key[:80])} is {value}; wanted at least 1")
    return value


def _build(library: Any, kind: HfKind, data: Mapping[str, Any], folder: Path) -> Any:
    """Build the network that a configuration describes, on the meta device."""
    with _one_error(folder, "its config.json describes no network that transformers builds"):
        config = library.CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
        for part in kind.config:
            config = getattr(config, part)
        with torch.device("meta"):
            return getattr(library, kind.network)(config, **kind.options)


def _load(network: Any, kind: HfKind, folder: Path) -> Any:
    """Load the folder's weights into a network like this one, strictly, under transformers' own renames.

    Raises:
        CheckpointError: keys or shapes differ, or values are not finite; lists the first ones.
    """
    source = shown(folder)
    tensors = {
        name.removeprefix(kind.prefix): tensor
        for name, tensor in read_folder(folder).items()
        if name.startswith(kind.prefix) and not name.startswith(kind.unused)
    }
    described = sum(parameter.numel() for parameter in network.parameters())
    stored = sum(tensor.numel() for tensor in tensors.values())
    if described > 2 * stored + _SPARE_WEIGHTS:
        raise CheckpointError(
            f"{source}: config.json describes a {kind.network} of {described} weights, and the files hold "
            f"{stored} of them; they do not belong together"
        )
    with _one_error(folder, "transformers cannot load its weights"):
        loaded, info = type(network).from_pretrained(
            None,
            config=network.config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # listed in `info`, and refused below
            output_loading_info=True,
            local_files_only=True,
            **kind.options,
        )
    refuse_mismatch(
        source,
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        misshapen=sorted(info["mismatched_keys"]),
        other_kinds=[
            f"{name} {str(tensor.dtype).removeprefix('torch.')} instead of a float"
            for name, tensor in tensors.items()
            if not tensor.is_floating_point()
            and (tensor.dtype != torch.int64 or name.endswith((".weight", ".bias")))  # others are indices
        ],
    )
    check_finite(loaded.state_dict(), source)  # in its dtype: a double may be too large for a float
    return loaded


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of `model.safetensors`, or of the files in its index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return load_tensors(folder / "model.safetensors")
    if not index.exists():
        raise CheckpointError(_without_weights(folder))
    files = read_json(index, _INDEX, error=CheckpointError)["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{shown(index)}: names {shown(name[:80])}; wanted safetensors in the same folder"
            )
        tensors |= load_tensors(folder / name)
    refuse_mismatch(shown(index), missing=sorted(files.keys() - tensors.keys()))
    return tensors


def _without_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{shown(folder)}: its weights are pytorch_model.bin, which could run code when read; wanted "
            f"model.safetensors. If you trust the folder, transformers writes one: "
            f"AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    return f"{shown(folder)}: has no weights; wanted model.safetensors, or its parts and their index"


def _read_preprocessor(folder: Path) -> _Preprocessor:
    """Read how the folder's images are prepared.

    Raises:
        CheckpointError: neither `preprocessor_config.json` nor a part of `processor_config.json` says it.
    """
    path = folder / "preprocessor_config.json"
    if path.exists():
        data: Any = read_json(path, _OBJECT, error=CheckpointError)
    else:
        path = folder / "processor_config.json"
        data = (
            read_json(path, _OBJECT, error=CheckpointError).get("image_processor") if path.exists() else None
        )
    if data is None:
        raise CheckpointError(
            f"{shown(folder)}: has no preprocessor_config.json, so mean, std and size are unknown; get it too"
        )
    return validate(_PREPROCESSOR, data, path, error=CheckpointError)


class _Input(NamedTuple):
    """What a network takes: the mean and std of RGB in [0, 1], and its native (height, width)."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    native_size: tuple[int, int]


def _find_input(data: _Preprocessor, kind: HfKind, trunk: HfTrunk, folder: Path) -> _Input:
    """Find what a network takes in its preprocessor's settings.

    Raises:
        CheckpointError: they are incomplete, or contradict the network.
    """
    where = f"{shown(folder)}: its preprocessor"
    factor = data.get("rescale_factor")
    is_other = factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-3)
    if data.get("do_rescale") is False or is_other:
        raise CheckpointError(f"{where} does not scale pixels to [0, 1] by 1/255; wanted one that does")
    mean, std = _IDENTITY
    if data.get("do_normalize") is not False:
        means, stds = data.get("image_mean"), data.get("image_std")
        if means is None or stds is None:
            raise CheckpointError(f"{where} has no image_mean or no image_std; get its whole file")
        mean, std = (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
    if kind.normalises and (mean, std) != _IDENTITY:
        raise CheckpointError(f"{where} normalises, and so does the network; set do_normalize to false in it")
    height, width = _find_size(data, trunk.patch_size, where)
    side = trunk.native_side
    if side is not None and (height, width) != (side, side):
        raise CheckpointError(
            f"{where} makes images of {height}x{width} pixels, and config.json describes a network for "
            f"{side}x{side}; they do not belong together"
        )
    patch = trunk.patch_size
    if not trunk.fixed_size and (height % patch or width % patch):
        raise CheckpointError(
            f"{where} makes images of {height}x{width} pixels, which do not divide into patches of {patch}"
        )
    return _Input(mean, std, (height, width))


def _find_size(data: _Preprocessor, patch: int, where: str) -> tuple[int, int]:
    """Find the (height, width) that the preprocessor makes of a square image."""
    size = data.get("size")
    if data.get("crop_size") is not None and data.get("do_center_crop") is not False:
        size = data["crop_size"]
    elif data.get("pad_size") is not None and data.get("do_pad") is not False:
        size = data["pad_size"]
    if isinstance(size, int):
        return size, size
    if size and "height" in size and "width" in size:
        return size["height"], size["width"]
    if size and (side := size.get("shortest_edge") or size.get("longest_edge")):
        return side, side
    if count := data.get("max_num_patches"):
        return math.isqrt(count) * patch, math.isqrt(count) * patch
    raise CheckpointError(f"{where} names no size; wanted size, crop_size or max_num_patches")


@final
class _TextSide(nn.Module):
    """The text encoder of a CLIP or SigLIP of transformers, mapping token ids [N, L] to [N, C]."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self.projection(self.encoder(input_ids=ids).pooler_output)
        return vectors


def _make_text(network: Any, data: Mapping[str, Any], folder: Path) -> ClipText:
    """Make the text tower.

    All texts get the full length, since SigLIP's vector is the last token's. SigLIP's are lower-cased: it was
    trained so, and not every SigLIP 2 has a tokenizer that does it.
    """
    config, is_clip = network.config.text_config, network.config.model_type == "clip"
    length, vocabulary = config.max_position_embeddings, config.vocab_size
    return ClipText(
        _TextSide(network.text_model, network.text_projection if is_clip else nn.Identity()),
        lambda: read_tokenizer(folder, length, vocabulary, lower_case=not is_clip),
        f"{hash_tokenizer(folder)} {json.dumps(data.get('text_config'), sort_keys=True)}",
    )


def hash_tokenizer(folder: Path) -> str:
    """Compute a sha256 (hex) of the tokenizer files in a folder, of which there may be none."""
    sha = hashlib.sha256()
    for path in _tokenizer_files(folder):
        content = read_bytes(path, limit=_MAX_TOKENIZER_BYTES, error=CheckpointError)
        sha.update(f"{path.name} {len(content)} ".encode() + content)
    return sha.hexdigest()


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]


def read_tokenizer(
    folder: Path, length: int, vocabulary: int, *, lower_case: bool = False
) -> Callable[[list[str]], Tensor]:
    """Read the tokenizer in a folder: texts -> ids [N, length], cut or padded, each below `vocabulary`.

    Raises:
        CheckpointError: there is none, transformers cannot read it, or it is another model's.
    """
    library = load_transformers()
    if not _tokenizer_files(folder):
        raise CheckpointError(
            f"{shown(folder)}: has no tokenizer, so it takes no texts; get tokenizer.json and "
            f"tokenizer_config.json too"
        )
    with _one_error(folder, "holds no tokenizer that transformers reads"):
        tokenizer = library.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        ids, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
        largest = max((number for token, number in ids.items() if token not in added), default=0)
    mismatch = f"and its text encoder takes padded ids below {vocabulary}; they do not belong together"
    if tokenizer.pad_token is None or largest >= vocabulary:
        problem = "no padding token" if tokenizer.pad_token is None else f"the id {largest}"
        raise CheckpointError(f"{shown(folder)}: its tokenizer has {problem}, {mismatch}")

    def tokenize(texts: list[str]) -> Tensor:
        ids: Tensor = tokenizer(
            [text.lower() for text in texts] if lower_case else texts,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )["input_ids"]
        if ids.max() >= vocabulary:  # an added token
            raise CheckpointError(f"{shown(folder)}: its tokenizer gave the id {int(ids.max())}, {mismatch}")
        return ids

    return tokenize


@contextlib.contextmanager
def _one_error(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers or tokenizers raise inside into one error that names the folder."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{shown(folder)}: {error}") from error
    except (RadioError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        raise MissingExtraError(
            f'{shown(folder)}: {_reason(error)}; get what is missing with: pip install "am-radio[hf]"'
        ) from error
    except BaseException as error:  # tokenizers' panics are not an Exception
        raise CheckpointError(f"{shown(folder)}: {what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {shown(' '.join(str(error).split())[:300])}"
