"""Reads the files of released RADIO models: their layouts, names, and reparametrised weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from ..archive import find_state, is_safetensors, plain_tensors, read_safetensors, read_torch
from ..checkpoint import Side, Sides, check_finite
from ..errors import CheckpointError, shown
from ..io import find_file, read_json, validate
from .hf import read_folder

# The names in both layouts, and ours for the parts of a release.
_NAMES = (
    (r"radio_model\.model\.", "trunk:"),
    (r"radio_model\.input_conditioner\.", "conditioner:"),
    (r"radio_model\.adaptors\.([^.]+)\.head_mlp\.", r"summary/\1:"),
    (r"radio_model\.adaptors\.([^.]+)\.feat_mlp\.", r"spatial/\1:"),
    (r"radio_model\._?feature_normalizer\.", "normaliser:"),
    (r"radio_model\.(summary_idxs)$", r":\1"),
    (r"base_model\.", "trunk:"),
    (r"input_conditioner\.", "conditioner:"),
    (r"_heads\.([^.]+)\.", r"summary/\1:"),
    (r"_feature_projections\.([^.]+)\.", r"spatial/\1:"),
    (r"_feature_normalizer\.", "normaliser:"),
)
_OF_TRAINING = re.compile(
    r"(^|\.)(_loss_states|adaloss\w*|lean_in_expected_losses|weight_balance_mask)(\.|$)|\.video_embedder\."
)
_UNUSED = re.compile(r"^(fc_norm|head)\.")  # parts of timm's ViTs that only their pooling uses
_TRUNK_NAMES = (
    (r"^inner\.", ""),
    (r"^patch_generator\.pos_embed$", "positions.table"),
    (r"^patch_generator\.embedder\.", "stem.proj."),
    (r"^patch_generator\.cls_token\.token$", "prefix"),
    (r"\.grandma$", ".gamma"),
)


class TeacherArgs(TypedDict, total=False, extra_items=Any):  # type: ignore[call-arg]
    """A teacher in the training arguments."""

    name: str
    type: str | None
    model: str | None
    pretrained: str | None
    use_summary: bool | None
    token_slot: int | None
    fd_upsample_factor: Annotated[int, Ge(0)] | None


class TrainingArgs(TypedDict, total=False, extra_items=Any):  # type: ignore[call-arg]
    """The training arguments that matter here."""

    teachers: list[TeacherArgs] | None
    cls_token_per_teacher: bool | None
    model_norm: bool | None
    vitdet_num_windowed: Annotated[int, Interval(ge=1, le=1024)] | None  # before each global block


class _Config(TypedDict, total=False, extra_items=Any):  # type: ignore[call-arg]
    """NVIDIA's config.json."""

    version: str | None
    args: TrainingArgs | None
    preferred_resolution: Side | Sides | None


_ARGS: TypeAdapter[TrainingArgs] = TypeAdapter(TrainingArgs)
_CONFIG: TypeAdapter[_Config] = TypeAdapter(_Config)


class Release(NamedTuple):
    """The content of a release, with our names for its parts."""

    trunk: dict[str, Tensor]
    summary: dict[str, dict[str, Tensor]]  # heads by the teacher's name, or index in the arguments
    spatial: dict[str, dict[str, Tensor]]
    conditioner: dict[str, Tensor]
    normaliser: dict[str, Tensor]
    summary_slots: list[int] | None
    args: TrainingArgs
    version: str
    native: int | None


def read_release(path: Path) -> Release:
    """Read a `.pth.tar`, safetensors, or the folder of a model; its tensors get our names, in float32.

    Raises:
        CheckpointError: no such file, or not one of a RADIO ViT.
    """
    where, config, args = shown(path), _Config(), TrainingArgs()
    tensors: dict[str, Tensor] = {}
    beside = path / "config.json" if path.is_dir() else path.with_name("config.json")
    if path.is_dir():
        tensors = _fold(read_folder(path), where)
    elif find_file(path, "weights file") and is_safetensors(path):
        tensors = _fold(plain_tensors(path, find_state(read_safetensors(path).tensors, path)), where)
    else:
        states, args = _read_pickled(path)
        for state in states:
            tensors |= _fold(plain_tensors(path, find_state(state, path)), where)
        return _sort(tensors, args, config, where)
    if beside.exists():
        config = read_json(beside, _CONFIG, error=CheckpointError)
        args = config.get("args") or args
    return _sort(tensors, args, config, where)


def _read_pickled(path: Path) -> tuple[list[Any], TrainingArgs]:
    """Read a `.pth.tar`: the weights, then the averaged ones if it has them, and the training arguments."""
    data = read_torch(path)
    content: Mapping[Any, Any] = data if isinstance(data, Mapping) else {}
    parts = (content.get(key) for key in ("state_dict", "state_dict_ema"))
    states = [part for part in parts if isinstance(part, Mapping) and part]
    given = content.get("args")
    args = vars(given) if isinstance(given, argparse.Namespace) else {} if given is None else given
    return states or [data], validate(_ARGS, args, f"{shown(path)}: its args", error=CheckpointError)


def _fold(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Replace spectrally reparametrised weights by what they stand for, in float32.

    W * (softplus(s) + 0.05) / sigma(W), with sigma the largest singular value; query, key and value have
    their own s and sigma. A plain weight of the same name comes first.
    """
    mark = ".parametrizations.weight."
    folded = {name: value for name, value in tensors.items() if mark not in name}
    for name in tensors:
        layer, marked, rest = name.partition(mark)
        if marked and rest == "original" and f"{layer}.weight" not in folded:
            states = {
                key.removeprefix(f"{layer}{mark}0."): value
                for key, value in tensors.items()
                if key.startswith(f"{layer}{mark}0.")
            }
            check_finite({name: tensors[name], **states}, where)
            try:
                folded[f"{layer}.weight"] = _effective(tensors[name], states)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:  # other shapes or names
                raise CheckpointError(
                    f"{where}: the spectral reparametrisation of {shown(layer[:200])} cannot be folded "
                    f"({str(error).splitlines()[0]})"
                ) from error
    return folded


def _effective(weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
    """Compute the weight that a reparametrised layer uses; parts without a state are unchanged."""
    if not all(tensor.is_floating_point() for tensor in (weight, *states.values())):
        raise ValueError("its numbers are not floating-point")
    weight, states = weight.float(), {name: value.float() for name, value in states.items()}
    if not any(name.startswith("parts.") for name in states):
        return _scaled(weight, states)
    indices = {int(name.split(".")[1]) for name in states if name.startswith("parts.")}
    count = 3 if len(weight) == 3 * weight[0].numel() else max(indices) + 1
    parts = []
    for index, part in enumerate(weight.chunk(count)):
        prefix = f"parts.{index}."
        own = {name.removeprefix(prefix): value for name, value in states.items() if name.startswith(prefix)}
        parts.append(_scaled(part, own) if own else part)
    return torch.cat(parts)


_LEAST_GAIN = 0.05


def _scaled(weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
    flat = weight.flatten(1)
    if "_u" in states and "_v" in states:
        sigma = states["_u"] @ flat @ states["_v"]
    else:
        sigma = torch.linalg.matrix_norm(flat, ord=2)
    gain = F.softplus(states["scale"].reshape(())) + _LEAST_GAIN if "scale" in states else 1.0
    return weight * (gain / sigma)


def _sort(tensors: dict[str, Tensor], args: TrainingArgs, config: _Config, where: str) -> Release:
    """Sort the tensors by the part of the model."""
    parts: dict[str, dict[str, Tensor]] = {"trunk": {}, "conditioner": {}, "normaliser": {}, "": {}}
    unknown = []
    for name, value in tensors.items():
        if _OF_TRAINING.search(name):
            continue
        renamed = next((re.sub(old, new, name) for old, new in _NAMES if re.match(old, name)), None)
        if renamed is None:
            unknown.append(name)
            continue
        group, _, key = renamed.partition(":")
        key = _trunk_name(key) if group == "trunk" else key
        part = parts.setdefault(group, {})
        if key in part:
            raise CheckpointError(f"{where}: has {shown(name[:200])} twice, under another name too")
        part[key] = value.float() if value.is_floating_point() else value
    has_norm = args.get("model_norm") is not False
    trunk = {
        name: value
        for name, value in parts["trunk"].items()
        if not _UNUSED.match(name) and (has_norm or not name.startswith("norm."))
    }
    if not trunk.keys() >= {"positions.table", "stem.proj.weight", "prefix"}:
        raise CheckpointError(
            f"{where}: not the weights of a RADIO ViT: wanted base_model.patch_generator.pos_embed, "
            f"…embedder.weight and …cls_token.token (or radio_model.model.…), got "
            f"{', '.join(shown(name[:80]) for name in list(tensors)[:3])}; an E-RADIO cannot be read"
        )
    if unknown:
        raise CheckpointError(
            f"{where}: not only the weights of a RADIO model: unexpected are "
            f"{', '.join(shown(name[:80]) for name in unknown[:3])} ({len(unknown)} of {len(tensors)})"
        )
    side = config.get("preferred_resolution")
    return Release(
        trunk=trunk,
        summary={key.removeprefix("summary/"): parts[key] for key in parts if key.startswith("summary/")},
        spatial={key.removeprefix("spatial/"): parts[key] for key in parts if key.startswith("spatial/")},
        conditioner=parts["conditioner"],
        normaliser=parts["normaliser"],
        summary_slots=_summary_slots(parts[""].get("summary_idxs"), where),
        args=args,
        version=config.get("version") or "",
        native=max(side, default=None) if isinstance(side, list) else side,
    )


def _summary_slots(indices: Tensor | None, where: str) -> list[int] | None:
    if indices is None:
        return None
    integral = indices.dtype in (torch.int32, torch.int64) and indices.ndim == 1
    slots: list[int] = indices.tolist() if integral else []
    if not slots or len(set(slots)) < len(slots):
        raise CheckpointError(
            f"{where}: its summary_idxs of {str(indices.dtype).removeprefix('torch.')} "
            f"{tuple(indices.shape)} are no list of different class tokens"
        )
    return slots


def _trunk_name(name: str) -> str:
    for pattern, replacement in _TRUNK_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
