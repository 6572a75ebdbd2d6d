"""Load the backbone or the teacher that a model spec names; `radio.specs` says how they are written."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch

from .config import AttentionWindow
from .errors import ConfigError, SizeError
from .foreign import check_encoder, watch_features
from .model import ModelConfig, build, load, load_untrained
from .specs import check_spec, parse
from .teachers import families
from .types import Backbone, Teacher, with_global_attention

_MAX_CHARS = 200  # characters of a spec in messages


def load_teacher(text: str, *, meta: bool = False) -> Teacher:
    """Load the frozen teacher that a spec such as `scenes:clip` or `dinov2:vitb14@FILE` names.

    Args:
        text: the spec.
        meta: build it on the meta device: same cost as the real one, without its file. A teacher of a family
            that cannot do this (another package's) is loaded and moved there.

    Raises:
        ConfigError: an unknown family or member.
        CheckpointError: the weights file is absent or another model's.
    """
    if ":" not in text:
        known = ", ".join(families)
        raise ConfigError(
            f"{text[:_MAX_CHARS]!r} is not a teacher; wanted FAMILY:NAME[@FILE], families: {known}"
        )
    spec = parse(text)
    if spec.family == "arch":
        raise ConfigError(f"{text!r} is an untrained student; a teacher comes from {', '.join(families)}")
    family = families[spec.family]
    if meta and "meta" in inspect.signature(family).parameters:
        return family(spec.name, spec.file, meta=True)
    teacher: Any = family(spec.name, spec.file)  # another package's may be any object
    if plugin := families.plugin(spec.family):
        what = f"{plugin}: {text!r:.80}"
        check_encoder(what, teacher, kind="Teacher", part="text")
        watch_features(what, teacher)
    return cast(Teacher, teacher.to(torch.device("meta"), torch.float32) if meta else teacher)


def load_backbone(
    text: str, *, random_init: bool = False, seed: int = 0, window: AttentionWindow | None = None
) -> Backbone:
    """Load the backbone that a spec names, in inference mode on the CPU.

    Args:
        text: a checkpoint file, `family:name[@file]`, `arch:name`, or an architecture's name.
        random_init: build a checkpoint's or an architecture's shape with fresh weights.
        seed: seed of the fresh weights.
        window: side of the attention windows, for models that have windows, or `global` for a ViT with
            global attention in every block; None: the model's own.

    Raises:
        ConfigError: an unknown name; suggests the nearest.
        CheckpointError: a file that is absent, foreign, truncated or altered.
        SizeError: a window for a backbone without windows, or global attention for one that has none.
    """
    return choose_window(_load(text, random_init, seed), window, text)


def choose_window(model: Backbone, window: AttentionWindow | None, text: str) -> Backbone:
    """Return the model that the spec `text` names with this window, as `load_backbone`.

    Raises:
        SizeError: as `load_backbone`.
    """
    if window is None:
        return model
    if window == "global":
        chosen = with_global_attention(model)
    else:
        chosen = None if model.with_window is None else model.with_window(window)
    if chosen is None:
        what = "global attention" if window == "global" else "attention windows"
        raise SizeError(f"{text} has no {what} to choose; use a vitdet student")
    return chosen


def _load(text: str, random_init: bool, seed: int) -> Backbone:
    kind = check_spec(text, random_init=random_init)
    if kind == "checkpoint":
        path = Path(text)
        return load_untrained(path, seed) if random_init else load(path)
    if kind == "architecture":
        return build(ModelConfig(student=text.removeprefix("arch:")), seed).eval()
    return load_teacher(text)
