"""Warm start: first weights of a student from a checkpoint, a timm model's file or a released RADIO model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from radio.checkpoint import list_first, refuse_mismatch
from radio.errors import CheckpointError, ConfigError, shown
from radio.hub import load_teacher
from radio.model import MLPAdaptor, RadioModel, load
from radio.nn.vit import IMAGENET_MEAN, IMAGENET_STD, NORM_EPS, LinearStem
from radio.specs import check_spec, parse
from radio.students import students
from radio.students.timm import TimmStudent, TimmTrunk, mean_and_std
from radio.students.vit import ViT
from radio.teachers.base import Frozen
from radio.teachers.release import ReleasedTrunk
from radio.types import Adaptor

# Letters: D width, G side of a table of positions, P its positions of class and register tokens, N all of it.

_FAMILIES = ("timm", "radio")  # of teachers whose trunk can be a student's
_OPTIONAL = re.compile(
    r"^prefix$|^norm\.(weight|bias)$|^trunk\.neck\."
)  # of a student; may keep fresh weights
_POOLING = re.compile(r"^(attn_pool|fc_norm|head|head_drop)\.")  # parts of timm's ViTs that ours do not have
_TABLES = ("positions.table", "trunk.network.pos_embed")


class _Source(NamedTuple):
    """What a model offers to a student."""

    student: dict[str, Tensor]  # by the names of a student's state dict
    adaptors: Mapping[str, Adaptor]
    fingerprint: str
    prefix: int = 0  # P of its table
    heads: int = 0  # of its attention if it is a plain ViT, whose weights do not tell them


class Started(NamedTuple):
    """What a model was started from."""

    fingerprint: str  # of all weights in the source
    adaptors: tuple[
        str, ...
    ]  # that were taken; as in every checkpoint, they speak their teachers' own spaces


def check_init(text: str) -> None:
    """Check that a spec names weights that a student can start from; no file but a checkpoint is looked for.

    Raises:
        ConfigError: an unknown name, or a family of other networks.
        CheckpointError: no such checkpoint, or an untrained architecture.
    """
    where, wanted = f"--init {text[:200]}", "give a checkpoint, timm:NAME@FILE or radio:FILE"
    if text in students or text.startswith("arch:"):
        raise CheckpointError(f"{where}: is an architecture and names no weights; {wanted}")
    if check_spec(text) == "teacher" and parse(text).family not in _FAMILIES:
        raise ConfigError(f"{where}: a student cannot start from it; {wanted}")


def warm_start(model: RadioModel, text: str, say: Callable[[str], None]) -> Started:
    """Give a model the weights that a spec names.

    The whole trunk is taken: blocks and patch embedding must fit, a table of positions is resized. Its class
    and register tokens are taken where there are as many, and an adaptor where the model has one of that name
    with the same widths and class token. What is not taken keeps its fresh weights.

    Args:
        model: on the CPU, not distributed yet.
        text: a checkpoint, `timm:NAME@FILE`, or `radio:FILE`.
        say: called with a line about what was taken, and one about what was not.

    Raises:
        ConfigError: as `check_init`.
        CheckpointError: as `check_init`, or the file is absent, damaged or another architecture's.
    """
    check_init(text)
    source = _read(model, text)
    student: Any = model.student
    own: dict[str, Tensor] = student.state_dict()
    if isinstance(student, ViT) and source.heads not in (0, student.config.heads):
        raise CheckpointError(
            f"--init {text[:200]}: has {source.heads} attention heads, and {model.config.student} has "
            f"{student.config.heads}; start another student from it"
        )
    given, resized, fresh = _fit_trunk(own, source, f"--init {shown(text[:200])}, for {model.config.student}")
    student.load_state_dict({name: given[name] for name in own if name not in fresh}, strict=False)
    taken, left = _take_adaptors(model.adaptors, source.adaptors)
    with_table = f" (positions resized: {', '.join(resized)})" if resized else ""
    adaptors = f", and the adaptors {', '.join(taken)}" if taken else ""
    say(f"starts from {text[:200]}: its trunk{with_table}{adaptors}")
    if fresh or left:
        say(
            f"not taken, and fresh: {list_first('weights of the trunk', fresh)}{'; ' * bool(fresh and left)}"
            f"{list_first('adaptors', left, most=20)}"
        )
    return Started(source.fingerprint, tuple(taken))


def read_fingerprint(model: RadioModel, text: str) -> str:
    """Return the fingerprint of the weights that a spec names, which a model like this was started from.

    Raises:
        ConfigError, CheckpointError: as `warm_start`.
    """
    check_init(text)
    return _read(model, text).fingerprint


def check_next(model: RadioModel, before: RadioModel) -> None:
    """Check that a model's trunk can start from that of another with the same student, by shapes alone.

    Args:
        model: on any device, like `before`; no values are read.
        before: built for another size perhaps.

    Raises:
        CheckpointError: as `warm_start`.
    """
    student: Any = model.student
    other: Any = before.student
    source = _Source(other.state_dict(), {}, "", _prefix_of(other))
    _fit_trunk(student.state_dict(), source, model.config.student)


def _read(model: RadioModel, text: str) -> _Source:
    """Load a model's weights under the names of the student that it is to fill."""
    student: Any = model.student
    if check_spec(text) == "checkpoint":
        loaded = load(Path(text))
        trained: Any = loaded.student
        _check_pixels(text, _mean_std(trained), _mean_std(student))
        heads = trained.config.heads if isinstance(trained, ViT) else 0
        weights = trained.state_dict()
        return _Source(weights, loaded.adaptors, loaded.fingerprint, _prefix_of(trained), heads)
    teacher: Any = load_teacher(text)
    assert isinstance(teacher, Frozen)  # as both families are
    trunk, pixels = teacher.trunk, _pixels_of(teacher)
    if isinstance(trunk, TimmTrunk) and isinstance(student, TimmStudent):
        _check_pixels(text, pixels, student.mean_std)
        weights = {f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
        return _Source(weights, {}, teacher.fingerprint, _num_prefix(trunk.network))
    if not isinstance(student, ViT):
        raise CheckpointError(
            f"--init {text[:200]}: cannot be {model.config.student}, which is another network; start from a "
            f"checkpoint of it"
        )
    if isinstance(trunk, ReleasedTrunk):
        weights, heads = trunk.vit.state_dict(), trunk.vit.config.heads
    else:
        assert isinstance(trunk, TimmTrunk)
        network: Any = trunk.network
        weights, heads = _from_timm(network, text), network.blocks[0].attn.num_heads
    if isinstance(student.stem, LinearStem) and "stem.proj.weight" in weights:
        weights |= _for_pixels(weights["stem.proj.weight"], weights["stem.proj.bias"], *pixels)
    if not any(name.endswith("ls1.gamma") for name in student.state_dict()):
        weights = _fold_scales(weights)
    return _Source(weights, teacher.adaptors, teacher.fingerprint, heads=heads)


def _from_timm(network: Any, text: str) -> dict[str, Tensor]:
    """Rename a timm ViT's weights as our ViT has them; the class token gets its position.

    Raises:
        CheckpointError: it is no plain ViT: exact GELU, norms with our epsilon, and learned positions.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    plain = (
        type(network) is VisionTransformer
        and network.pos_embed is not None
        and all(type(norm) in (nn.LayerNorm, LayerNorm) and norm.eps == NORM_EPS for norm in norms)
        and all(
            isinstance(act, nn.GELU) and act.approximate == "none"
            for act in (getattr(block.mlp, "act", None) for block in network.blocks)
        )
    )
    if not plain:
        raise CheckpointError(
            f"--init {text[:200]}: is no plain ViT as ours are (exact GELU, norms with an epsilon of "
            f"{NORM_EPS:g}, one table of positions); take --student {text.partition('@')[0][:200]} instead"
        )
    weights = {
        name.replace("patch_embed.", "stem."): tensor
        for name, tensor in network.state_dict().items()
        if not _POOLING.match(name) and name not in ("pos_embed", "cls_token", "reg_token")
    }
    weights.setdefault("stem.proj.bias", torch.zeros(len(weights["stem.proj.weight"])))
    tokens = [token for token in (network.cls_token, network.reg_token) if token is not None]
    prefix = torch.cat(tokens, dim=1).detach() if tokens else torch.empty(1, 0, network.embed_dim)
    table, first = network.pos_embed.detach(), _num_prefix(network)
    prefix[:, :first] += table[:, :first]
    return {**weights, "prefix": prefix, "positions.table": table[:, first:]}


def _prefix_of(student: Any) -> int:
    """Return how many positions of a student's table belong to class and register tokens."""
    return _num_prefix(student.trunk.network) if isinstance(student, TimmStudent) else 0


def _num_prefix(network: Any) -> int:
    """Return how many positions of a timm network's table belong to class and register tokens."""
    whole = getattr(network, "no_embed_class", False)
    return 0 if whole else int(getattr(network, "num_prefix_tokens", 0))


Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]


def _pixels_of(teacher: Frozen) -> Pixels:
    """Return the mean and std of a teacher's images."""
    (m0, m1, m2), (s0, s1, s2) = (teacher.get_buffer(name).flatten().tolist() for name in ("mean", "std"))
    return (m0, m1, m2), (s0, s1, s2)


def _mean_std(student: Any) -> Pixels:
    return (
        mean_and_std(student.trunk.network)
        if isinstance(student, TimmStudent)
        else (IMAGENET_MEAN, IMAGENET_STD)
    )


def _check_pixels(text: str, given: Pixels, own: Pixels) -> None:
    """Check that images are normalised alike.

    Raises:
        CheckpointError: they are not.
    """
    close = [abs(a - b) < 1e-6 for a, b in zip((*given[0], *given[1]), (*own[0], *own[1]), strict=True)]
    if not all(close):
        raise CheckpointError(
            f"--init {text[:200]}: its images have the mean {given[0]} and the std {given[1]}, and the "
            f"student's {own[0]} and {own[1]}; name both with the same tag, as timm:NAME.TAG"
        )


def _for_pixels(
    weight: Tensor, bias: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Tensor]:
    """Change a patch embedding [D, 3, p, p], [D] for images of a mean and std to one for ImageNet's."""
    own_mean, own_std = torch.tensor(IMAGENET_MEAN).double(), torch.tensor(IMAGENET_STD).double()
    given_mean, given_std = torch.tensor(mean).double(), torch.tensor(std).double()
    wide = weight.double()
    shift = ((own_mean - given_mean) / given_std).view(1, 3, 1, 1)
    scaled = wide * (own_std / given_std).view(1, 3, 1, 1)
    moved = bias.double() + (wide * shift).sum((1, 2, 3))
    return {"stem.proj.weight": scaled.to(weight), "stem.proj.bias": moved.to(bias)}


def _fold_scales(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply LayerScale's factors into the layers before them, for a student that has none."""
    folded = {name: tensor for name, tensor in weights.items() if not name.endswith(".gamma")}
    for name, gamma in weights.items():
        block, _, scale = name.removesuffix(".gamma").rpartition(".")
        if name.endswith(".gamma"):
            layer = f"{block}.attn.proj" if scale == "ls1" else f"{block}.mlp.fc2"
            if f"{layer}.weight" in folded:
                folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * gamma[:, None]
                folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * gamma
    return folded


def _fit_trunk(
    own: Mapping[str, Tensor], source: _Source, where: str
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Fit a source's weights to a student's; return all of them, what was resized, and what stays fresh.

    Raises:
        CheckpointError: they are another architecture's; `where` names them.
    """
    given, resized = _fit_tables(own, source)
    fresh = [
        name for name, tensor in own.items() if _OPTIONAL.search(name) and not _fits(given, name, tensor)
    ]
    _refuse_other(own, given, fresh, where)
    return given, resized, fresh


def _fit_tables(own: Mapping[str, Tensor], source: _Source) -> tuple[dict[str, Tensor], list[str]]:
    """Resize the source's tables of positions to the student's; return all weights, and what was resized."""
    given, resized = dict(source.student), []
    for name in _TABLES:
        if name in own and name in given and own[name].shape != given[name].shape:
            given[name] = _resize_table(given[name], own[name].shape, source.prefix)
            first, last = (
                isqrt(max(n - source.prefix, 0)) for n in (source.student[name].shape[1], own[name].shape[1])
            )
            resized.append(f"{first}x{first} to {last}x{last}")
    return given, resized


def _resize_table(table: Tensor, shape: torch.Size, prefix: int) -> Tensor:
    """Resize a table [1, P + G*G, D] to another N by bicubic interpolation; unchanged if it cannot be."""
    before, after = (isqrt(max(n - prefix, 0)) for n in (table.shape[1], shape[1]))
    whole = before**2 + prefix == table.shape[1] and after**2 + prefix == shape[1]
    if table.shape[2] != shape[2] or not whole or not before or not after:
        return table
    plane = table[:, prefix:].float().unflatten(1, (before, before)).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=(after, after), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((table[:, :prefix].float(), plane.flatten(2).transpose(1, 2)), dim=1).to(table.dtype)


def _fits(given: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    return name in given and given[name].shape == tensor.shape


def _refuse_other(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], fresh: list[str], where: str
) -> None:
    """Check that weights are those of the student's architecture, except for those that stay fresh."""
    optional = [name for name in given if _OPTIONAL.search(name)]
    refuse_mismatch(
        where,
        missing=[name for name in own if name not in given and name not in fresh],
        unexpected=[name for name in given if name not in own and name not in optional],
        misshapen=[
            (name, given[name].shape, tensor.shape)
            for name, tensor in own.items()
            if name in given and name not in fresh and given[name].shape != tensor.shape
        ],
    )


def _take_adaptors(own: Mapping[str, Adaptor], given: Mapping[str, Adaptor]) -> tuple[list[str], list[str]]:
    """Load the adaptors that fit; return their names, and the names of the others with the reason."""
    taken, left = [], [f"{name} (no teacher of this run)" for name in given if name not in own]
    for name, adaptor in own.items():
        other = dict(given.items()).get(name)
        assert isinstance(adaptor, MLPAdaptor)
        if other is None:
            left.append(f"{name} (not in it)")
        elif not isinstance(other, MLPAdaptor):
            left.append(f"{name} (a head of another kind)")
        elif other.config.slot != adaptor.config.slot or _shapes(other) != _shapes(adaptor):
            left.append(f"{name} (of other widths, or for another class token)")
        else:
            adaptor.load_state_dict(other.state_dict())
            taken.append(name)
    return taken, left


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
