"""Texts to unit vectors; a class is the mean of its filled templates. Kept under a hash of what counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from evals.core.chunks import Damage, TensorSpec, check_all_there, find_missing, read_tensors, write_tensors
from evals.core.dist import Group
from evals.core.evaluator import Advance, Watch, silent
from evals.core.features import to_unit
from radio.errors import RadioError, require
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


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TextCache:
    """Where vectors of texts are kept, and how those that are not there are made."""

    folder: Path
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    group: Group = field(default_factory=Group)
    watch: Watch = silent
    damage: Damage = field(default_factory=Damage)


def classifier(
    tower: TextTower, names: Sequence[str], templates: Sequence[str], *, cache: TextCache
) -> Tensor:
    """`class_vectors`, from the cache if they are there; one rank makes them. Raises as they do."""
    key = _key("classifier", tower, names, templates)
    bar = partial(cache.watch, "class vectors", len(names) * len(templates))
    build = partial(class_vectors, tower, names, templates)
    return _kept(cache, key, tower, build, bar, (None, len(names)))


def text_vectors(tower: TextTower, texts: Sequence[str], *, cache: TextCache) -> Tensor:
    """[N, E] float32 unit vectors of sentences, from the cache if they are there; one rank makes them."""

    def build(advance: Advance) -> Tensor:
        encode = _Encoder(tower, advance).encode_text
        batches = [list(texts[i : i + _TEXTS_AT_ONCE]) for i in range(0, len(texts), _TEXTS_AT_ONCE)]
        return torch.cat([encode(_Texts(batch), normalize=True) for batch in batches])

    bar = partial(cache.watch, "caption vectors", len(texts))
    return _kept(cache, _key("texts", tower, texts), tower, build, bar, (len(texts), None))


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
        return to_unit(vectors) if normalize else vectors


def _fill(template: str, name: str) -> str:
    return template.replace("{}", name)


def _key(kind: str, tower: TextTower, *texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([f"{kind}/2", tower.fingerprint, *texts]).encode()).hexdigest()


def _kept(
    cache: TextCache,
    key: str,
    tower: TextTower,
    build: Callable[[Advance], Tensor],
    bar: Callable[[], Any],
    shape: tuple[int | None, int | None],
) -> Tensor:
    """The vectors in the cache; the leader makes them where they are not there or damaged.

    Raises:
        RadioError: the text tower gives values that are not finite.
    """
    path = cache.folder / "texts" / f"{key}.safetensors"
    specs = {"vectors": TensorSpec(torch.float32, shape)}

    def make() -> None:
        if not find_missing([path], partial(read_tensors, specs=specs), cache.damage):
            return
        with bar() as advance, torch.no_grad(), _on_device(tower, cache.device):
            vectors = build(advance)
        if not bool(torch.isfinite(vectors).all()):
            raise RadioError(
                "the text tower gives values that are not finite, or a vector of zeros; look at its weights"
            )
        write_tensors(path, {"vectors": vectors})

    cache.group.on_leader(make)
    check_all_there([path])
    return read_tensors(path, specs).tensors["vectors"]


@contextmanager
def _on_device(tower: TextTower, device: torch.device) -> Iterator[None]:
    """The tower on the device, and back on the CPU afterwards, where pictures' vectors are projected."""
    if not isinstance(tower, nn.Module):
        yield
        return
    try:
        tower.to(device)
        yield
    finally:
        tower.to("cpu")
