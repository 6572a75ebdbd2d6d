"""Texts to unit vectors; a class is the mean of its filled templates. Kept under a hash of what counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.core.evaluator import Advance, Watch, silent
from radio.errors import require
from radio.io import write_bytes
from radio.types import TextTower

# Letters: K classes, N texts, E text width.

_CLASSES_AT_ONCE = 10
_TEXTS_AT_ONCE = 512


def _ignore(steps: int) -> None:
    """Nothing to show."""


def class_vectors(
    tower: TextTower, names: Sequence[str], templates: Sequence[str], advance: Advance = _ignore
) -> Tensor:
    """[E, K] float32, one unit column a class: every template encoded and normalised, mean, normalised again.

    Built by open_clip's `build_zero_shot_classifier`, whatever the tower. The number of classes that go
    through the tower together does not change it (beyond the rounding of float32).

    Raises:
        MissingExtraError: open_clip is not installed.
        RadioError: a name that the tower cannot read.
    """
    made: Tensor = require("open_clip", extra="zeroshot").build_zero_shot_classifier(
        _Encoder(tower, advance),
        _Texts,
        names,
        [partial(_fill, template) for template in templates],
        num_classes_per_batch=_CLASSES_AT_ONCE,
    )
    return made


def classifier(
    tower: TextTower, names: Sequence[str], templates: Sequence[str], *, cache: Path, watch: Watch = silent
) -> Tensor:
    """`class_vectors`, from the cache if they are there. Raises as they do."""
    key = _key("classifier", tower, names, templates)
    bar = partial(watch, "class vectors", len(names) * len(templates))
    return _kept(cache, key, partial(class_vectors, tower, names, templates), bar)


def text_vectors(tower: TextTower, texts: Sequence[str], *, cache: Path, watch: Watch = silent) -> Tensor:
    """[N, E] float32 unit vectors of whole sentences."""

    def build(advance: Advance) -> Tensor:
        encode = _Encoder(tower, advance).encode_text
        batches = [list(texts[i : i + _TEXTS_AT_ONCE]) for i in range(0, len(texts), _TEXTS_AT_ONCE)]
        return torch.cat([encode(_Texts(batch), normalize=True) for batch in batches])

    return _kept(cache, _key("texts", tower, texts), build, partial(watch, "caption vectors", len(texts)))


@final
class _Texts(list[str]):
    """What open_clip takes for token ids: the texts themselves, which a tower tokenizes by itself."""

    def to(self, device: Any) -> _Texts:
        """The same texts: a tower knows its own device."""
        return self


@final
class _Encoder:
    """What open_clip takes for its model."""

    def __init__(self, tower: TextTower, advance: Advance) -> None:
        self._tower, self._advance = tower, advance

    def encode_text(self, texts: Sequence[str], normalize: bool) -> Tensor:
        """[N, E] float32 on the CPU."""
        vectors = self._tower.encode(texts).float().cpu()
        self._advance(len(texts))
        return F.normalize(vectors, dim=1) if normalize else vectors


def _fill(template: str, name: str) -> str:
    return template.replace("{}", name)


def _key(kind: str, tower: TextTower, *texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([f"{kind}/1", tower.fingerprint, *texts]).encode()).hexdigest()


def _kept(cache: Path, key: str, build: Callable[[Advance], Tensor], bar: Callable[[], Any]) -> Tensor:
    """The vectors in the cache, made first where they are not there or damaged."""
    path = cache / "texts" / f"{key}.safetensors"
    if path.is_file():
        try:
            return safetensors.torch.load_file(path)["vectors"]
        except safetensors.SafetensorError:
            pass  # damaged on disk: made again
    with bar() as advance, torch.no_grad():
        vectors = build(advance).contiguous()
    write_bytes(path, safetensors.torch.save({"vectors": vectors}))
    return vectors
