"""What stands in for SAM's image encoder: a student through its SAM adaptor, or a SAM's own encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from evals.core.evaluator import Carded
from radio.adaptors import AdaptorConfig, MLPAdaptor
from radio.checkpoint import digest
from radio.errors import CheckpointError, ConfigError, RadioError, SizeError
from radio.hub import parse
from radio.metadata import teachers_on
from radio.resample import resize_features
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

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything to a device, the encoder to a type."""
        self.model.to(device, dtype).eval()
        self.head.to(device)
        if isinstance(self.adaptor, MLPAdaptor):
            self.adaptor.to(device, dtype)

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


def make_drop_in(model: Backbone, checkpoint: Path | None, size: int | None, seed: int) -> DropIn:
    """The drop-in of a student that learned from a SAM, of a SAM, or of an untrained architecture.

    Args:
        checkpoint: a released SAM file to take the head from; None takes what the model's card names.
        size: side in pixels that the model sees; None as `SamSettings.size` says.
        seed: of the head and the adaptor of an untrained architecture.

    Raises:
        ConfigError: the model has not learned from a SAM and is none, or the head is another SAM's.
        CheckpointError: the SAM's file is not where the card says, or not a SAM's.
        SizeError: a size or window that does not fit; names the nearest that does.
        MissingExtraError: segment-anything is not installed.
    """
    family = model.name.partition(":")[0]
    if model.name == "scenes:sam" or family == "sam":
        return _sam_itself(model, checkpoint, size)
    entries = _cards_teachers(model)
    taught = [entry for entry in entries if _is_sam(entry)]
    if taught:
        entry = taught[0]
        head = _head(entry, checkpoint)
        side = _side(model, head.side, size or entry.get("student_resolution"))
        width = _adaptor_width(model, entry["name"])
        if width != head.token_dim:
            raise ConfigError(
                f"the adaptor {entry['name']!r} of {model.name} gives {width} channels, and the neck of "
                f"{head.name} takes {head.token_dim}; name the SAM it learned from with --sam-checkpoint"
            )
        return DropIn(model, head, side, entry["name"])
    if entries or not isinstance(model, Adapting):
        learned = ", ".join(str(entry["model"]) for entry in entries) or "no teacher"
        raise ConfigError(
            f"{model.name} learned from {learned}; the drop-in needs a student of a SAM, or a SAM itself "
            f"(scenes:sam, sam:vit_b@FILE)"
        )
    return _untrained(model, checkpoint, size, seed)


def _sam_itself(model: Backbone, checkpoint: Path | None, size: int | None) -> DropIn:
    if model.name == "scenes:sam":
        if checkpoint is not None:
            raise ConfigError("scenes:sam brings its own decoder; leave --sam-checkpoint out")
        head = load_sam_head("scenes:sam")
    else:
        file = checkpoint or (model.file if isinstance(model, Filed) else None)
        head = load_sam_head(model.name, file)
    if head.token_dim != model.token_dim:
        raise ConfigError(
            f"{model.name} gives {model.token_dim} channels, and {head.name} takes {head.token_dim}"
        )
    return DropIn(model, head, _side(model, head.side, size or head.side), None)


def _untrained(model: Backbone, checkpoint: Path | None, size: int | None, seed: int) -> DropIn:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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


def _is_sam(entry: Mapping[str, Any]) -> bool:
    return str(entry["model"]) == "scenes:sam" or str(entry["model"]).startswith("sam:")


def _head(entry: Mapping[str, Any], checkpoint: Path | None) -> SamHead:
    spec = str(entry["model"])
    if checkpoint is not None:
        return load_sam_head(spec, checkpoint)
    try:
        return load_sam_head("scenes:sam") if spec == "scenes:sam" else load_sam_head(spec, parse(spec).file)
    except RadioError as error:
        raise CheckpointError(
            f"the student learned from {spec}, whose decoder cannot be loaded: {error}; if the file has "
            f"moved, name it with --sam-checkpoint"
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
