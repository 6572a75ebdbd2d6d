"""What stands in for SAM's image encoder: a student through its SAM adaptor, or a SAM's own encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from evals.core.evaluator import Carded, place
from radio.adaptors import AdaptorConfig, MLPAdaptor
from radio.checkpoint import digest
from radio.errors import CheckpointError, ConfigError, RadioError, SizeError, did_you_mean, shown
from radio.hub import load_teacher, parse
from radio.metadata import teachers_on
from radio.model import seeded
from radio.resample import resize_features
from radio.teachers import families
from radio.teachers.sam import MEMBERS
from radio.teachers.sam_decoder import SamHead, load_sam_head, new_released_sam
from radio.types import Backbone, Features, Windowed

# Letters: B pictures, C neck width, h w embedding grid.

_TOKENS = (
    8  # a student's default grid is a multiple of this: 72 x 72 for a patch of 14, where 8, 9 and 18 fit
)
_UNTRAINED = "vit_h"  # the head of an architecture that no SAM taught


@runtime_checkable
class Adapting(Protocol):
    """A model that carries its features into a teacher's space."""

    def adapt(self, name: str, features: Features, grid: tuple[int, int] | None = None) -> Features:
        """The features in the space of teacher `name`, on `grid`."""


@runtime_checkable
class Filed(Protocol):
    """A model that knows the weights file it was read from."""

    @property
    def file(self) -> Path | None:
        """The file; None for weights that are shipped."""


@runtime_checkable
class Segmenting(Protocol):
    """A teacher of another package that is a SAM's encoder, and brings the rest of it."""

    @property
    def sam(self) -> Any:
        """The whole `segment_anything.modeling.Sam`."""


@final
@dataclass(frozen=True, slots=True)
class DropIn:
    """A backbone behind SAM's neck."""

    model: Backbone
    head: SamHead
    side: int  # pixels of the square that the backbone sees
    adaptor: str | MLPAdaptor | None  # of the student; None for a SAM itself
    notes: tuple[str, ...] = ()

    @property
    def is_untrained(self) -> bool:
        """Whether adaptor and head are random, since no SAM taught the model."""
        return isinstance(self.adaptor, MLPAdaptor)

    @property
    def adaptor_fingerprint(self) -> str:
        """Which adaptor it is; a hash of its weights where they are not the model's own."""
        if isinstance(self.adaptor, MLPAdaptor):
            return digest(self.adaptor.state_dict())
        return str(self.adaptor)

    def to(self, device: torch.device, dtype: torch.dtype) -> DropIn:
        """Move everything to a device; for another type than float32 the encoder is copied, not rounded."""
        adaptor = self.adaptor
        if isinstance(adaptor, MLPAdaptor):
            adaptor = copy.deepcopy(adaptor).to(device, dtype)
        return replace(
            self, model=place(self.model, device, dtype), adaptor=adaptor, head=self.head.to(device)
        )

    def embed(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, 3, side, side] RGB in [0, 1] -> the mask decoder's input [B, C, h, w], float32."""
        features = self.model(images.to(dtype))
        if isinstance(self.adaptor, MLPAdaptor):
            features = self.adaptor(features, self.head.grid)
        elif self.adaptor is not None:
            assert isinstance(self.model, Adapting), "make_drop_in has looked"
            features = self.model.adapt(self.adaptor, features, self.head.grid)
        placed = resize_features(features._replace(tokens=features.tokens.float()), self.head.grid)
        return self.head.embed(placed.map())


def make_drop_in(
    model: Backbone, checkpoint: Path | None, size: int | None, seed: int, teacher: str | None = None
) -> DropIn:
    """The drop-in of a student that learned from a SAM, of a SAM, or of an untrained architecture.

    Args:
        checkpoint: a released SAM file to take the head from; None takes what the model's card names.
        size: side in pixels that the model sees; None as `SamSettings.size` says.
        seed: of the head and the adaptor of an untrained architecture.
        teacher: which of the student's teachers is the SAM, by its name on the card; None finds it.

    Raises:
        ConfigError: the model has not learned from a SAM and is none, or the head is another SAM's.
        CheckpointError: the SAM's file is not where the card says, or not a SAM's.
        SizeError: a size or window that does not fit; names the nearest that does.
        MissingExtraError: segment-anything is not installed.
    """
    entries = _cards_teachers(model)
    if teacher is not None and not entries:
        raise ConfigError(f"{model.name} has no teachers on its card; leave --teacher out")
    if entries:
        entry = _choose(model, entries, checkpoint, teacher)
        head = _taught_head(entry, checkpoint)
        side = _side(model, head.side, size or _trained_side(entry))
        width = _adaptor_width(model, entry["name"])
        if width != head.token_dim:
            raise ConfigError(
                f"the adaptor {entry['name']!r} of {model.name} gives {width} channels, and the neck of "
                f"{head.name} takes {head.token_dim}; name the SAM it learned from with --sam-checkpoint"
            )
        return DropIn(model, head, side, entry["name"])
    if isinstance(model, Adapting):
        return _untrained(model, checkpoint, size, seed)
    if _is_sam(model.name) or _is_foreign(model.name):
        return _sam_itself(model, checkpoint, size)
    raise ConfigError(
        f"{model.name} learned from no teacher; the drop-in needs a student of a SAM, or a SAM itself "
        f"(scenes:sam, sam:vit_b@FILE)"
    )


def _choose(
    model: Backbone, entries: Sequence[Mapping[str, Any]], checkpoint: Path | None, teacher: str | None
) -> Mapping[str, Any]:
    """The entry of the SAM among a student's teachers."""
    if teacher is not None:
        named = [entry for entry in entries if entry["name"] == teacher]
        if not named:
            names = [entry["name"] for entry in entries]
            hint = did_you_mean(teacher, names) or f"; it has {', '.join(names)}"
            raise ConfigError(f"{model.name} has no teacher {teacher!r} on its card{hint}")
        return named[0]
    sams = [entry for entry in entries if _is_sam(entry["model"])]
    foreign = [entry for entry in entries if _is_foreign(entry["model"])]
    if not sams and len(foreign) == 1:
        return foreign[0]
    if sams:
        return sams[0]
    learned = ", ".join(shown(entry["model"]) for entry in entries)
    which = "; say which teacher is the SAM with --teacher NAME" if foreign else ""
    raise ConfigError(
        f"{model.name} learned from {learned}; the drop-in needs a student of a SAM, or a SAM itself "
        f"(scenes:sam, sam:vit_b@FILE){which}"
    )


def _sam_itself(model: Backbone, checkpoint: Path | None, size: int | None) -> DropIn:
    if model.name == "scenes:sam" and checkpoint is not None:
        raise ConfigError("scenes:sam brings its own decoder; leave --sam-checkpoint out")
    file = checkpoint or (model.file if isinstance(model, Filed) else None)
    head = _head(model.name, file, lambda: model)
    if head.token_dim != model.token_dim:
        raise ConfigError(
            f"{model.name} gives {model.token_dim} channels, and {head.name} takes {head.token_dim}"
        )
    return DropIn(model, head, _side(model, head.side, size or head.side), None)


def _head(spec: str, file: Path | None, find: Callable[[], Backbone]) -> SamHead:
    """The head of a SAM: shipped, out of its file, or what an encoder of another package brings.

    Args:
        find: gives the encoder.
    """
    if _is_sam(spec) or file is not None:
        return load_sam_head(spec, file)
    encoder = find()
    if isinstance(encoder, Segmenting):
        return SamHead(encoder.sam, encoder.name)
    if isinstance(encoder, Filed) and encoder.file is not None:
        return load_sam_head(spec, encoder.file)
    raise ConfigError(
        f"{shown(spec)} brings no mask decoder; if it is a SAM, name its released file with --sam-checkpoint"
    )


def _untrained(model: Backbone, checkpoint: Path | None, size: int | None, seed: int) -> DropIn:
    with seeded(seed):
        if checkpoint is None:
            head = SamHead(new_released_sam(MEMBERS[_UNTRAINED].width), f"untrained sam:{_UNTRAINED}")
        else:
            head = load_sam_head("the drop-in's decoder", checkpoint)
        config = AdaptorConfig(name="sam", summary_dim=head.token_dim, token_dim=head.token_dim)
        adaptor = MLPAdaptor(config, model.summary_dim, model.token_dim).eval()
    drawn = "encoder, adaptor and decoder" if checkpoint is None else "encoder and adaptor"
    note = f"untrained: {drawn} have random weights, so only images/s mean anything beyond the floor"
    return DropIn(model, head, _side(model, head.side, size), adaptor, (note,))


def _cards_teachers(model: Backbone) -> list[Mapping[str, Any]]:
    return teachers_on(model.card, model.name) if isinstance(model, Carded) else []


def _trained_side(entry: Mapping[str, Any]) -> int | None:
    """The side at which the student learned from a teacher; None where the card names no square."""
    sides = entry.get("student_resolution")
    if isinstance(sides, list):
        return sides[0] if len(set(sides)) == 1 else None
    return sides


def _is_sam(spec: str) -> bool:
    return spec == "scenes:sam" or spec.startswith("sam:")


def _is_foreign(spec: str) -> bool:
    """Whether a teacher is of another package's family, which may be a SAM."""
    family, colon, _ = spec.partition(":")
    if not colon or family not in families:
        return bool(colon)
    return not getattr(families[family], "__module__", "").startswith("radio.")


def _taught_head(entry: Mapping[str, Any], checkpoint: Path | None) -> SamHead:
    spec = entry["model"]
    if checkpoint is not None:
        return load_sam_head(spec, checkpoint)
    try:
        return _head(spec, parse(spec).file, lambda: load_teacher(spec))
    except RadioError as error:
        kind = CheckpointError if _is_sam(spec) else ConfigError
        raise kind(
            f"the student learned from {shown(spec)}, whose decoder cannot be loaded: {error}; if the file "
            f"has moved, name it with --sam-checkpoint"
        ) from error


def _adaptor_width(model: Backbone, name: str) -> int:
    assert isinstance(model, Adapting), "a card belongs to a student"
    with torch.no_grad():
        probe = Features(torch.zeros(1, model.summary_dim), torch.zeros(1, 1, model.token_dim), (1, 1))
        return model.adapt(name, probe).tokens.shape[-1]


def _side(model: Backbone, frame: int, wanted: int | None) -> int:
    """The side that the model sees, checked."""
    patch = (model.with_window(None) if isinstance(model, Windowed) else model).fit(1, 1)[0]
    side = wanted or max(frame // patch // _TOKENS * _TOKENS, 1) * patch
    nearest = model.fit(side, side)[0]
    if nearest == side:
        return side
    message = (
        f"{model.name} cannot take {side}x{side} px; the nearest size that it can is {nearest}x{nearest}"
    )
    step = model.fit(1, 1)[0]
    token = model.with_window(1).fit(1, 1)[0] if step != patch and isinstance(model, Windowed) else step
    if step > token and side > token and side % token == 0:
        grid, window = side // token, step // token
        fitting = sorted((w for w in range(1, grid + 1) if grid % w == 0), key=lambda w: (abs(w - window), w))
        message = (
            f"{model.name} cannot take {side}x{side} px with windows of {window}: they do not divide "
            f"its {grid}x{grid} tokens; the nearest windows that do are {fitting[0]} and {fitting[1]}, the "
            f"nearest size for {window} is --size {nearest}"
        )
    raise SizeError(message)
