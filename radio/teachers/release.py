"""Released RADIO models, read by the names and shapes in their files: `radio:FILE`, `radio:VERSION@FILE`.

From the first AM-RADIO release to C-RADIOv4, as `.pth.tar` or in NVIDIA's Hugging Face layout (safetensors,
with its config.json beside it). What a file does not say follows its version, see `_VERSIONS`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from ..checkpoint import check_finite, load_state
from ..errors import CheckpointError, shown
from ..nn.phi_s import FeatureNormaliser
from ..nn.release import AttentionHead, ReleasedAdaptor, build_head
from ..nn.vit import IMAGENET_MEAN, IMAGENET_STD, CroppedPositions, SwiGLU
from ..ops import nearest_multiple
from ..students import Schedule
from ..students.vit import ViT, ViTConfig
from ..types import Features, Teacher
from . import families
from .base import Frozen, find_member
from .release_file import Release, TeacherArgs, read_release

# Letters: B batch, D width, P class and register tokens, K class tokens, G side of the table of positions.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Version:
    """What the files of a version do not say."""

    teachers: tuple[str, ...]  # one for each class token; the last, a SAM, is not in the summary
    align_corners: bool = False  # see `CroppedPositions`
    schedule: Schedule = "quarters"  # of the global blocks, with windows
    native: int = 512  # preferred side in pixels


_V1 = _Version(teachers=("clip", "dino_v2", "sam"), schedule="runs-of-5", native=224)
_V2_5 = _Version(teachers=("clip", "siglip", "dino_v2", "sam"), native=768)
_V3 = replace(_V2_5, teachers=("clip", "siglip2-g", "dino_v2", "sam"), native=512)
_V4 = _Version(teachers=("siglip2-g", "dino_v3_7b", "sam3"))
_VERSIONS = {
    "v1": _V1,
    "v2": replace(_V1, native=432),
    "v2.1": replace(_V1, native=432),
    "v2.5": _V2_5,
    "v3-b": replace(_V3, align_corners=True),
    "v3-l": _V3,
    "v3-h": replace(_V3, align_corners=True),
    "v3-g": _V3,
    "v4": _V4,
}
_HEADS = {1152: 16, 1280: 16}  # attention heads by width
_HEAD_WIDTH = 64  # of all other widths
_FAMILIES = {"open_clip": "openclip", "dino_v2": "dinov2"}  # by the type of a teacher in `args`


@families.register("radio")
def radio(name: str, file: Path | None) -> Teacher:
    """Load a released RADIO model with its adaptors: `radio:FILE`, or `radio:VERSION@FILE`.

    FILE is a `.pth.tar`, safetensors in NVIDIA's layout, or the folder that holds `model.safetensors`. The
    summary is the class tokens of the teachers that were trained with one; the tokens have passed the final
    norm and the feature normaliser, if the release has them (its adaptors see the tokens before the
    normaliser). Any size works that is a multiple of the patch, and of the window where one is chosen.

    Raises:
        ConfigError: an unknown version.
        CheckpointError: no such file, or not a RADIO ViT's; names the first missing and unexpected keys.
    """
    version = None
    if file is not None and name not in _VERSIONS and Path(f"{name}@{file}").exists():
        name, file = f"{name}@{file}", None  # a path may hold an @
    if file is not None:
        version = find_member(_VERSIONS, name, "RADIO version")
    path = Path(name) if file is None else file
    return _build(read_release(path), version, f"radio:{path}", path)


def _guess_version(release: Release, prefix: int, where: str) -> _Version:
    """Choose the version that the file names, or the one that its shapes are of.

    Raises:
        CheckpointError: it names one that is not known.
    """
    named = re.search(r"v(\d(?:\.\d)?)(?:-([blhg]))?", release.version.lower())
    if "c-radio_v2" in release.version.lower():
        return _V2_5
    if named:
        for key in (f"v{named[1]}-{named[2]}", f"v{named[1]}"):
            if key in _VERSIONS:
                return _VERSIONS[key]
        raise CheckpointError(
            f"{where}: its version {shown(release.version[:80])!r} is not known; if it is built like one of "
            f"{', '.join(_VERSIONS)}, say so as in radio:v4@FILE"
        )
    patch = isqrt(release.trunk["stem.proj.weight"].shape[-1] // 3)
    if prefix == 10:
        return _V4
    if patch == 14 and "blocks.0.mlp.w12.weight" not in release.trunk:
        return _V1
    known = {teacher["name"] for teacher in release.args.get("teachers") or [] if "name" in teacher}
    if "siglip" in known:
        return _V2_5
    width = release.trunk["positions.table"].shape[-1]
    return replace(_V3, align_corners=width in (768, 1280))


class _Slots(NamedTuple):
    """Which class token belongs to which teacher."""

    num_classes: int  # class tokens of the trunk
    by_name: dict[str, int]
    in_summary: list[int]
    names: list[str]  # of the teachers in the order of the arguments, some of them repeated


def _assign_slots(release: Release, version: _Version, prefix: int, where: str) -> _Slots:
    """Assign class tokens to teachers by the training arguments, else by the version."""
    teachers = [teacher for teacher in release.args.get("teachers") or [] if "name" in teacher]
    by_name: dict[str, int] = {}
    in_summary = []
    if teachers:
        names = [teacher["name"] for teacher in teachers]
        distinct = list(dict.fromkeys(names))
        shared = release.args.get("cls_token_per_teacher") is False
        for teacher in teachers:
            slot = teacher.get("token_slot")
            own = distinct.index(teacher["name"]) if slot is None else slot
            by_name.setdefault(teacher["name"], 0 if shared else own)
            if teacher.get("use_summary") is not False:
                in_summary.append(by_name[teacher["name"]])
    else:
        names = list(version.teachers)
        by_name = {name: slot for slot, name in enumerate(names) if slot < prefix}
        in_summary = list(by_name.values())[:-1] or [0]  # without SAM's
    if release.summary_slots is not None:
        in_summary = release.summary_slots
    in_summary = list(dict.fromkeys(in_summary))
    num_classes = max([*by_name.values(), *in_summary], default=-1) + 1
    if not in_summary or min([*by_name.values(), *in_summary]) < 0 or num_classes > prefix:
        raise CheckpointError(
            f"{where}: its summary reads the class tokens {in_summary}, its adaptors read "
            f"{sorted(by_name.values())}, and it has {prefix} tokens of classes and registers"
        )
    return _Slots(num_classes, by_name, in_summary, names)


def _build(release: Release, version: _Version | None, spec: str, path: Path) -> Frozen:
    where = shown(path)
    config = _shape(release.trunk, where)
    prefix = release.trunk["prefix"]
    version = _guess_version(release, len(prefix), where) if version is None else version
    slots = _assign_slots(release, version, len(prefix), where)
    schedule = version.schedule
    if (windowed := release.args.get("vitdet_num_windowed")) is not None:
        schedule = "runs-of-5" if windowed == 5 else max(config.depth // (windowed + 1), 1)
    if schedule == "quarters" and config.depth < 8:
        schedule = max(config.depth // 2, 1)  # as many global blocks as leave a windowed one before each
    config = replace(
        config, class_tokens=slots.num_classes, registers=len(prefix) - slots.num_classes, schedule=schedule
    )
    vit = _load_vit(config, release.trunk, version.align_corners, where)
    normaliser = None
    if release.normaliser:
        normaliser = FeatureNormaliser(config.width)
        load_state(normaliser, release.normaliser, f"{where}: feature normaliser")
        if torch.linalg.inv_ex(normaliser.tx).info:
            raise CheckpointError(f"{where}: its feature normaliser has no inverse, and its adaptors need it")
    adaptors, teachers = _build_adaptors(release, slots, config.width, normaliser, where)
    mean, std = (_channel_values(release.conditioner, key, where) for key in ("norm_mean", "norm_std"))
    if std and min(std) <= 0:
        raise CheckpointError(f"{where}: its input_conditioner.norm_std is {std}; wanted numbers above 0")
    trunk = ReleasedTrunk(vit, slots.in_summary, normaliser)
    side = nearest_multiple(release.native or version.native, config.patch)
    layout = {name: [adaptor.position, adaptor.upsample] for name, adaptor in adaptors.items()}
    return Frozen(
        trunk=trunk,
        name=spec,
        identity="radio",
        mean=mean or IMAGENET_MEAN,
        std=std or IMAGENET_STD,
        native_size=(side, side),
        patch_size=config.patch,
        summary_dim=config.width * len(slots.in_summary),
        token_dim=config.width,
        summary_tokens=len(slots.in_summary) if normaliser is None else 0,
        adaptors=adaptors,
        metadata={"teachers": teachers} if teachers else None,
        variant=json.dumps([slots.in_summary, version.align_corners, schedule, layout]),
        weights_file=path,
    )


def num_heads(width: int) -> int:
    """Return the number of attention heads of a released ViT, which its file does not say; 0 if unknown."""
    return _HEADS.get(width, 0 if width % _HEAD_WIDTH else width // _HEAD_WIDTH)


def _shape(trunk: Mapping[str, Tensor], where: str) -> ViTConfig:
    """Read the trunk's shape from those of its weights.

    Raises:
        CheckpointError: shapes that no ViT has.
    """
    table, embedder = trunk["positions.table"], trunk["stem.proj.weight"]
    width = table.shape[-1] if table.ndim == 3 else 0
    side = isqrt(table.shape[1]) if table.ndim == 3 else 0
    patch = isqrt(embedder.shape[-1] // 3) if embedder.ndim == 2 else 0
    depth = len({name.split(".")[1] for name in trunk if name.startswith("blocks.")})
    hidden = _rows(trunk, "blocks.0.mlp.fc1.weight") or 4 * width
    heads = num_heads(width)
    if not (
        width
        and side
        and side * side == table.shape[1]
        and patch
        and embedder.shape == (width, 3 * patch * patch)
        and heads
        and depth
        and trunk["prefix"].ndim == 2
    ):
        raise CheckpointError(
            f"{where}: not the shape of a RADIO ViT: positions {tuple(table.shape)}, patch embedding "
            f"{tuple(embedder.shape)}, class tokens {tuple(trunk['prefix'].shape)}, {depth} blocks"
        )
    return ViTConfig(
        name="radio",
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        positions=side,
        mlp_ratio=hidden / width,
        layer_scale=1.0 if "blocks.0.ls1.gamma" in trunk else None,
    )


def _rows(trunk: Mapping[str, Tensor], name: str) -> int:
    """Count the rows of a matrix; 0 if there is none of that name."""
    matrix = trunk.get(name)
    return 0 if matrix is None or matrix.ndim != 2 else len(matrix)


def _load_vit(config: ViTConfig, trunk: Mapping[str, Tensor], align_corners: bool, where: str) -> ViT:
    tensors = dict(trunk)
    embedder = tensors["stem.proj.weight"]
    tensors["stem.proj.weight"] = embedder.reshape(config.width, 3, config.patch, config.patch)
    tensors.setdefault("stem.proj.bias", torch.zeros(config.width))
    tensors["prefix"] = tensors["prefix"].unsqueeze(0)
    with torch.device("meta"):
        vit = ViT(config)
        vit.positions = CroppedPositions(config.width, config.positions, align_corners=align_corners)
        if gate := _rows(tensors, "blocks.0.mlp.w12.weight") // 2:
            for block in vit.blocks:
                block.mlp = SwiGLU(config.width, gate)
    if "norm.weight" not in tensors:
        vit.norm = nn.Identity()  # type: ignore[assignment]
    vit.normalise = nn.Identity()  # type: ignore[assignment]
    load_state(vit, tensors, where)
    return vit


def _build_adaptors(
    release: Release, slots: _Slots, width: int, normaliser: FeatureNormaliser | None, where: str
) -> tuple[nn.ModuleDict, list[dict[str, Any]]]:
    """Build the adaptors, and the entries of the metadata about their teachers."""
    adaptors, entries = nn.ModuleDict(), []
    arguments = {t["name"]: t for t in release.args.get("teachers") or [] if "name" in t}
    for key in dict.fromkeys([*release.summary, *release.spatial]):
        name = key
        if re.fullmatch("[0-9]{1,3}", key):  # its place among the teachers
            name = slots.names[int(key)] if int(key) < len(slots.names) else f"teacher{key}"
            if name in slots.names[: int(key)]:
                continue  # a teacher that is listed twice: its first head counts, as its first slot does
        slot = slots.by_name.get(name)
        teacher = arguments.get(name, TeacherArgs())
        if slot is None and key in release.summary:
            raise CheckpointError(
                f"{where}: nothing says which class token the head of {shown(name)!r} reads; put the "
                f"release's config.json beside it, or name its version as in radio:v4@FILE"
            )
        heads = [
            _load_head(
                part.get(key), width, f"{where}: {kind} head of {shown(name)}", spatial=kind == "spatial"
            )
            for kind, part in (("summary", release.summary), ("spatial", release.spatial))
        ]
        adaptor = ReleasedAdaptor(
            *heads,
            position=slots.in_summary.index(slot) if slot in slots.in_summary else None,
            width=width,
            upsample=teacher.get("fd_upsample_factor") or 1,
            normaliser=normaliser,
        )
        _add(adaptors, name, adaptor, where)
        entries.append({"name": name, **_spec_of(teacher)})
    return adaptors, entries


def _add(adaptors: nn.ModuleDict, name: str, adaptor: ReleasedAdaptor, where: str) -> None:
    if name in adaptors:
        raise CheckpointError(f"{where}: has two adaptors named {shown(name)!r}")
    try:
        adaptors[name] = adaptor
    except KeyError as error:  # a dot, or a word such as "keys" that torch's ModuleDict needs itself
        raise CheckpointError(f"{where}: no adaptor can be named {shown(name)!r}") from error


def _load_head(
    tensors: Mapping[str, Tensor] | None, width: int, where: str, *, spatial: bool
) -> nn.Module | None:
    if tensors is None:
        return None
    with torch.device("meta"):
        head = build_head({name: tensor.shape for name, tensor in tensors.items()})
    if head is None:
        raise CheckpointError(
            f"{where}: no known kind of head; its weights are "
            f"{', '.join(shown(name[:80]) for name in list(tensors)[:3])}"
        )
    load_state(head, tensors, where)
    if isinstance(head, AttentionHead) and not spatial:
        raise CheckpointError(f"{where}: has attention, and a summary is one token")
    first = tensors.get("fc1.weight", tensors.get("mlp.fc1.weight"))
    if first is not None and first.shape[1] != width:
        raise CheckpointError(f"{where}: it reads {first.shape[1]} numbers, and the trunk's width is {width}")
    return head


def _spec_of(teacher: TeacherArgs) -> dict[str, str]:
    """Return the metadata's `model` of a teacher whose family is known; the release has no file of it."""
    kind, model = teacher.get("type"), teacher.get("model")
    family = _FAMILIES.get(kind or "", kind)
    if not family or not model or family not in families:
        return {}
    member = re.sub(r"^dinov2_", "", model) if family == "dinov2" else model
    if family == "sam":
        member = member.replace("-", "_")
    tag = teacher.get("pretrained") if family == "openclip" else None
    return {"model": f"{family}:{member}{f'/{tag}' if tag else ''}"}


def _channel_values(
    conditioner: Mapping[str, Tensor], key: str, where: str
) -> tuple[float, float, float] | None:
    value = conditioner.get(key)
    if value is None:
        return None
    if value.numel() != 3 or value.is_complex():
        raise CheckpointError(
            f"{where}: its input_conditioner.{key} is {str(value.dtype).removeprefix('torch.')} "
            f"{tuple(value.shape)}; wanted one number per channel"
        )
    check_finite({key: value}, where)
    first, second, third = value.flatten().tolist()
    return first, second, third


@final
class ReleasedTrunk(nn.Module):
    """A released ViT that maps normalised images to `Features`.

    Args:
        vit: the network; its summary holds all class tokens.
        in_summary: the class tokens that the release's summary is made of.
        normaliser: of the tokens; None if the release has none.
    """

    def __init__(self, vit: ViT, in_summary: list[int], normaliser: FeatureNormaliser | None) -> None:
        super().__init__()
        self.vit, self.in_summary, self.normaliser = vit, in_summary, normaliser
        self.num_blocks = vit.num_blocks

    @property
    def window(self) -> int | None:
        """Side in tokens of the attention windows."""
        return self.vit.window

    def with_window(self, side: int | None) -> Self:
        """Return this trunk with windows of another side, sharing the weights."""
        twin = copy.copy(self)
        twin._modules = {**self._modules, "vit": self.vit.with_window(side)}
        return twin

    def forward(self, images: Tensor) -> Features:
        """Map normalised [B, 3, h, w] to the release's summary [B, K * D] and tokens [B, T, D]."""
        return self._select(self.vit(images))

    def intermediate(self, images: Tensor, blocks: list[int]) -> list[Features]:
        """Compute the features after each of the given blocks."""
        return [self._select(features) for features in self.vit.intermediate(images, blocks)]

    def _select(self, features: Features) -> Features:
        width = features.tokens.shape[-1]
        tokens = features.summary.unflatten(1, (-1, width))[:, self.in_summary]
        placed = features.tokens if self.normaliser is None else self.normaliser(features.tokens)
        return Features(tokens.flatten(1), placed, features.grid)
