"""Replacements for SAM's image encoder: a student with its SAM adaptor, or a SAM's own encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from evals.core.features import place
from radio.checkpoint import digest, teachers_on
from radio.errors import CheckpointError, ConfigError, RadioError, SizeError, did_you_mean, shown
from radio.hub import load_teacher
from radio.model import AdaptorConfig, MLPAdaptor, RadioModel, seeded
from radio.ops import resize_features
from radio.specs import parse
from radio.teachers import families
from radio.teachers.sam import MEMBERS, SamHead, load_sam_head, new_released_sam
from radio.types import Backbone, Features, find_adaptor

from . import SamSettings

# Letters: B images, C neck width, h w embedding grid.

_TOKENS = 8  # a default grid is a multiple of this: 72 x 72 for a patch of 14, divisible by 8, 9 and 18
_UNTRAINED = "vit_h"  # the head for an architecture that was not distilled from a SAM


@final
@dataclass(frozen=True, slots=True)
class DropIn:
    """A backbone in place of SAM's image encoder, with SAM's neck and decoder."""

    model: Backbone
    head: SamHead
    side: int  # pixels of the backbone's square input
    adaptor: str | MLPAdaptor | None  # of the student; None for a SAM itself
    notes: tuple[str, ...] = ()

    @property
    def is_untrained(self) -> bool:
        """Whether the adaptor is random, since the model was not distilled from a SAM."""
        return isinstance(self.adaptor, MLPAdaptor)

    @property
    def adaptor_fingerprint(self) -> str:
        """Name of the model's adaptor; a hash of the weights where it is a separate one."""
        if isinstance(self.adaptor, MLPAdaptor):
            return digest(self.adaptor.state_dict())
        return str(self.adaptor)

    def to(self, device: torch.device, dtype: torch.dtype) -> DropIn:
        """Move everything to a device; for a dtype other than float32 the encoder is copied, not changed."""
        adaptor = self.adaptor
        if isinstance(adaptor, MLPAdaptor):
            adaptor = copy.deepcopy(adaptor).to(device, dtype)
        return replace(
            self, model=place(self.model, device, dtype), adaptor=adaptor, head=self.head.to(device)
        )

    def embed(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Embed images: [B, 3, side, side] RGB in [0, 1] -> mask decoder's input [B, C, h, w], float32."""
        features = self.model(images.to(dtype))
        if isinstance(self.adaptor, MLPAdaptor):
            features = self.adaptor(features, self.head.grid)
        elif self.adaptor is not None:
            features = find_adaptor(self.model, self.adaptor)(features, self.head.grid)
        placed = resize_features(features._replace(tokens=features.tokens.float()), self.head.grid)
        return self.head.embed(placed.map())


def make_drop_in(
    model: Backbone, checkpoint: Path | None, size: int | None, seed: int, teacher: str | None = None
) -> DropIn:
    """Build the drop-in for a student distilled from a SAM, for a SAM, or for an untrained architecture.

    Args:
        checkpoint: a released SAM file with the head (default: the one named in the model's metadata).
        size: side of the model's input in pixels; None: the default of `SamSettings.size`.
        seed: for the head and the adaptor of an untrained architecture.
        teacher: name in the metadata of the teacher that is the SAM (default: chosen by its family).

    Raises:
        ConfigError: the model is neither a SAM nor distilled from one, or the head is another SAM's.
        CheckpointError: the SAM's file is not at the path in the metadata, or is not a SAM's.
        SizeError: a size or window that does not fit; names the nearest that does.
        MissingExtraError: segment-anything is not installed.
    """
    entries = teachers_on(model.metadata, model.name)
    if teacher is not None and not entries:
        raise ConfigError(f"{model.name} has no teachers in its metadata; leave --teacher out")
    if entries:
        entry = _choose(model, entries, checkpoint, teacher)
        head = _teachers_head(entry, checkpoint)
        sides = entry.get("student_resolution")  # in training with this teacher; may be several
        if isinstance(sides, list):
            sides = sides[0] if len(set(sides)) == 1 else None
        side = _side(model, head.side, size or sides)
        probe = Features(torch.zeros(1, model.summary_dim), torch.zeros(1, 1, model.token_dim), (1, 1))
        with torch.no_grad():
            width = find_adaptor(model, entry["name"])(probe).tokens.shape[-1]
        if width != head.token_dim:
            raise ConfigError(
                f"the adaptor {entry['name']!r} of {model.name} gives {width} channels, and the neck of "
                f"{head.name} takes {head.token_dim}; name the SAM it learned from with --sam-checkpoint"
            )
        return DropIn(model, head, side, entry["name"])
    if isinstance(model, RadioModel):
        return _untrained(model, checkpoint, size, seed)
    if _is_foreign(model.name) or model.sam is not None:
        return _sam_itself(model, checkpoint, size)
    raise ConfigError(
        f"{model.name} learned from no teacher; the drop-in needs a student of a SAM, or a SAM itself "
        f"(scenes:sam, sam:vit_b@FILE)"
    )


def input_size(model: Backbone, settings: SamSettings) -> tuple[int, int]:
    """Return the size (height, width) at which a student of a SAM, or a SAM itself, gets images.

    Raises:
        ConfigError, SizeError: as `make_drop_in`.
    """
    frame, sides = max(model.native_size), None
    if entries := teachers_on(model.metadata, model.name):
        entry = _choose(model, entries, settings.sam_checkpoint, settings.teacher)
        sides = entry.get("student_resolution")
        frame = max(load_teacher(entry["model"], meta=True).native_size)
    side = _side(model, frame, settings.size or (sides if isinstance(sides, int) else None))
    return side, side


def _choose(
    model: Backbone, entries: Sequence[Mapping[str, Any]], checkpoint: Path | None, teacher: str | None
) -> Mapping[str, Any]:
    """Choose the metadata entry of the SAM among a student's teachers.

    A SAM is recognised by its attribute `sam`; another package's also by being its only one.
    """
    if teacher is not None:
        named = [entry for entry in entries if entry["name"] == teacher]
        if not named:
            names = [entry["name"] for entry in entries]
            hint = did_you_mean(teacher, names) or f"; it has {', '.join(names)}"
            raise ConfigError(f"{model.name} has no teacher {teacher!r} in its metadata{hint}")
        return named[0]
    known = [entry for entry in entries if "model" in entry]
    own = [entry for entry in known if not _is_foreign(entry["model"])]
    foreign = [entry for entry in known if _is_foreign(entry["model"])]
    unreadable = {}
    for entry in [*own, *foreign]:  # this package's first: on the meta device they need no files
        if foreign == [entry]:
            return entry
        try:
            if load_teacher(entry["model"], meta=entry in own).sam is not None:
                return entry
        except RadioError as error:  # such as a file that has moved
            unreadable[entry["name"]] = f" ({error})"
    learned = ", ".join(
        shown(entry.get("model", entry["name"])) + unreadable.get(entry["name"], "") for entry in entries
    )
    hint = "; name the teacher that is the SAM with --teacher NAME" if len(own) < len(entries) else ""
    raise ConfigError(
        f"{model.name} learned from {learned}; the drop-in needs a student of a SAM, or a SAM itself "
        f"(scenes:sam, sam:vit_b@FILE){hint}"
    )


def _sam_itself(model: Backbone, checkpoint: Path | None, size: int | None) -> DropIn:
    if checkpoint is not None and model.weights_file is None and model.sam is not None:
        raise ConfigError(f"{model.name} brings its own decoder; leave --sam-checkpoint out")
    head = _head(model.name, checkpoint or model.weights_file, lambda: model)
    if head.token_dim != model.token_dim:
        raise ConfigError(
            f"{model.name} gives {model.token_dim} channels, and {head.name} takes {head.token_dim}"
        )
    return DropIn(model, head, _side(model, head.side, size or head.side), None)


def _head(spec: str, file: Path | None, find: Callable[[], Backbone]) -> SamHead:
    """Load the head of a SAM: shipped, from its file, or from another package's encoder.

    Args:
        find: returns the encoder.
    """
    if file is not None:
        return load_sam_head(spec, file)
    encoder = find()
    if (sam := encoder.sam) is not None:
        return SamHead(sam, encoder.name)
    if encoder.weights_file is not None:
        return load_sam_head(spec, encoder.weights_file)
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
    parts = "encoder, adaptor and decoder" if checkpoint is None else "encoder and adaptor"
    note = f"untrained: {parts} have random weights, so only images/s mean anything beyond the floor"
    return DropIn(model, head, _side(model, head.side, size), adaptor, (note,))


def _is_foreign(spec: str) -> bool:
    """Check whether a teacher belongs to another package's family, which may be a SAM."""
    family, colon, _ = spec.partition(":")
    if not colon or family not in families:
        return bool(colon)
    return not getattr(families[family], "__module__", "").startswith("radio.")


def _teachers_head(entry: Mapping[str, Any], checkpoint: Path | None) -> SamHead:
    spec = entry.get("model", entry["name"])
    if checkpoint is not None:
        return load_sam_head(spec, checkpoint)
    if "model" not in entry:
        raise ConfigError(
            f"nothing says which SAM the teacher {shown(spec)} is; name its released file with "
            f"--sam-checkpoint"
        )
    try:
        return _head(spec, parse(spec).file, lambda: load_teacher(spec))
    except RadioError as error:
        error_type = ConfigError if isinstance(error, ConfigError) else CheckpointError
        raise error_type(
            f"the student learned from {shown(spec)}, whose decoder cannot be loaded: {error}; if the file "
            f"has moved, name it with --sam-checkpoint"
        ) from error


def _side(model: Backbone, frame: int, size: int | None) -> int:
    """Return the side of the model's input; raise SizeError if the model does not take it."""
    patch, window = model.patch_size, model.window
    tokens = max(frame // patch, 1)
    side = size or (tokens // _TOKENS * _TOKENS or tokens) * patch
    nearest = model.nearest_size(side, side)[0]
    if nearest == side or (size is None and window is None):
        return nearest
    message = (
        f"{model.name} cannot take {side}x{side} px; the nearest size that it can is {nearest}x{nearest}"
    )
    token = model.nearest_size(1, 1)[0] // window if window else side
    if window and side > token and side % token == 0:
        grid = side // token
        fitting = sorted((w for w in range(1, grid + 1) if grid % w == 0), key=lambda w: (abs(w - window), w))
        message = (
            f"{model.name} cannot take {side}x{side} px with windows of {window}: they do not divide "
            f"its {grid}x{grid} tokens; the nearest windows that do are {fitting[0]} and {fitting[1]}, the "
            f"nearest size for {window} is --size {nearest}"
        )
    raise SizeError(message)
