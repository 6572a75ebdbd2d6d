"""The weights of a student under other projects' names: timm's, and those of the released RADIO models."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.models.efficientvit_mit import ClassifierHead as HiddenHead
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from ..errors import ConfigError
from ..model import MLPAdaptor, RadioModel
from ..nn.vit import IMAGENET_MEAN, IMAGENET_STD, NORM_EPS, Normalise
from ..students.timm import TimmStudent, TimmTrunk, size_options
from ..students.vit import ViT, ViTConfig
from ..teachers.release import num_heads
from ..types import Features
from .parity import Written, check_sizes, named_outputs

# Letters: B batch, D width, K class tokens, P class and register tokens, G side of the table of positions.

_NAFLEX = "naflexvit_huge_patch16_radio_v4"  # its positions are resized as ours; all shapes are given
_RELEASED_EPS = 1e-5  # of the layer norms in released heads


def write_timm(model: RadioModel, path: Path) -> Written:
    """Write the student's weights for `timm.create_model`, and read them back by it.

    Raises:
        ConfigError: timm has no counterpart for the student; names the part that it lacks.
    """
    student: Any = model.student
    if isinstance(student, TimmStudent):
        name, arguments = student.trunk.name, _timm_arguments(student)
        tensors = student.trunk.network.state_dict()
    elif isinstance(student, ViT):
        name, arguments, tensors = _NAFLEX, _naflex_arguments(student), _naflex_weights(student)
    else:
        raise ConfigError(f"{model.name}: timm has no such architecture; take --to hf, onnx or pt2")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    network: Any = timm.create_model(name, checkpoint_path=str(path), **arguments).eval()
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    notes = [f'timm.create_model("{name}", checkpoint_path="{path}", {call})']
    if isinstance(network, SwinTransformerV2) and student.native_size[0] != network.patch_embed.img_size[0]:
        # No argument of create_model scales its windows with the image.
        network.set_input_size(img_size=student.native_size)
        notes.append(f"then model.set_input_size(img_size={student.native_size})")
    config = resolve_model_data_config(network)
    normalise = Normalise(config["mean"], config["std"])
    notes.append(f"its images are normalised with mean {config['mean']} and std {config['std']}")
    if isinstance(student, ViT):
        read, more = _naflex_reader(student.config, network)
        notes += more
    else:
        read = TimmTrunk(name, network)
    if model.adaptors:
        notes.append(f"without the adaptors {', '.join(model.adaptors)}: a timm model has none")

    def reader(images: Tensor) -> dict[str, Tensor]:
        return named_outputs(read(normalise(images)), {})

    return Written({path.name: reader}, check_sizes(model), notes)


def _timm_arguments(student: TimmStudent) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` for a student that is a timm network.

    Raises:
        ConfigError: it has a neck, or no hidden layers in a head that timm always gives some.
    """
    network: Any = student.trunk.network
    if student.trunk.neck is not None:
        raise ConfigError(f"{student.name}: timm has no neck that up-samples; take --to hf, onnx or pt2")
    if isinstance(getattr(network, "head", None), HiddenHead):
        raise ConfigError(
            f"{student.name}: timm's network has hidden layers in its head, which the student leaves out; "
            f"take --to hf, onnx or pt2"
        )
    arguments = {"num_classes": 0, **size_options(student.trunk.name)}
    side, own = student.native_size[0], network.pretrained_cfg["input_size"][1]
    has_sides = student.fixed_size or "dynamic_img_size" in arguments
    if has_sides and side != own and not isinstance(network, SwinTransformerV2):
        arguments["img_size"] = side
    return arguments


def _naflex_arguments(student: ViT) -> dict[str, Any]:
    """Return the arguments that make timm's NaFlexVit the same network as a ViT student.

    Raises:
        ConfigError: a convolutional stem, or attention windows.
    """
    config = student.config
    lacking = []
    if config.stem == "conv":
        lacking.append("no convolutional stem (--student.stem linear)")
    if config.window is not None:
        lacking.append(f"no attention in windows of {config.window} tokens on some of its blocks")
    if lacking:
        raise ConfigError(
            f"{config.name}: timm's ViT has {', and '.join(lacking)}; take --to hf, onnx or pt2"
        )
    return {
        "num_classes": 0,
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": len(student.state_dict()["blocks.0.mlp.fc1.bias"]) / config.width,
        **({} if config.layer_scale is None else {"init_values": config.layer_scale}),
        "class_token": config.class_tokens > 0,
        "reg_tokens": max(config.class_tokens - 1, 0) + config.registers,
        "global_pool": "token" if config.class_tokens else "avg",
        "final_norm": True,
        "fc_norm": False,
        "embed_proj_type": "conv",
        "pos_embed_grid_size": (config.positions, config.positions),
        "pretrained_cfg_overlay": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    }


def _naflex_weights(student: ViT) -> dict[str, Tensor]:
    """Rename a ViT student's weights as timm's NaFlexVit names them."""
    tensors = student.state_dict()
    side, classes = student.config.positions, min(student.config.class_tokens, 1)
    prefix = tensors.pop("prefix")  # [1, P, D]
    renamed = {
        "embeds.pos_embed": tensors.pop("positions.table").unflatten(1, (side, side)),
        "embeds.proj.weight": tensors.pop("stem.proj.weight"),
        "embeds.proj.bias": tensors.pop("stem.proj.bias"),
        "embeds.cls_token": prefix[:, :classes],
        "embeds.reg_token": prefix[:, classes:],
    }
    return {name: tensor for name, tensor in {**renamed, **tensors}.items() if tensor.numel()}


def _naflex_reader(config: ViTConfig, network: Any) -> tuple[Callable[[Tensor], Features], list[str]]:
    """Return a function that computes features of normalised images, and how to do that with timm."""
    classes, prefix = config.class_tokens, config.class_tokens + config.registers
    several = f"model.forward_features(images)[:, :{classes}].flatten(1)"
    calls = (several if classes > 1 else "model(images)", f"model.forward_features(images)[:, {prefix}:]")

    def read(images: Tensor) -> Features:
        grid = images.shape[2] // config.patch, images.shape[3] // config.patch
        last = network.forward_features(images)
        summary = last[:, :classes].flatten(1) if classes > 1 else network(images)
        return Features(summary, last[:, prefix:], grid)

    return read, [f"summary: {calls[0]}; tokens: {calls[1]}"]


def released_layout(model: RadioModel) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Rename a ViT student's weights, and those of its adaptors, as the released RADIO models name them.

    The patch embedding's bias, which that layout lacks, is added to every position: bilinear weights sum to
    one. Released heads have a layer norm of another epsilon: the layer before it is scaled to undo that.

    Returns:
        The tensors, what the config.json beside them has to say, and what the layout cannot express.

    Raises:
        ConfigError: the student cannot be expressed; names the part that has no place.
    """
    student: Any = model.student
    config = student.config if isinstance(student, ViT) else None
    if config is None or config.stem != "linear":
        raise ConfigError("it is for ViTs with a linear stem")
    if not config.class_tokens:
        raise ConfigError("it has no place for a summary that is the mean of the tokens")
    if config.heads != num_heads(config.width):
        raise ConfigError(
            f"it does not store the number of attention heads, and readers assume {num_heads(config.width)} "
            f"at a width of {config.width}; this student has {config.heads}"
        )
    if config.window is not None and config.schedule not in ("quarters", 4, "runs-of-5"):
        raise ConfigError(f"it has no place for {config.schedule} global blocks among windowed ones")
    tensors = _released_trunk(student)
    teachers, notes = [], []
    for name, adaptor in model.adaptors.items():
        assert isinstance(adaptor, MLPAdaptor)
        slot = adaptor.config.slot
        if slot is None and config.class_tokens > 1:
            notes.append(f"without the adaptor {name}: it reads all class tokens, and a released head one")
            continue
        for kind, head in (("head_mlp", adaptor.summary), ("feat_mlp", adaptor.spatial)):
            tensors |= _released_head(head.state_dict(), f"radio_model.adaptors.{name}.{kind}")
        teachers.append({"name": name, "token_slot": slot or 0, "use_summary": True})
    entries: dict[str, Any] = {
        "version": "am-radio, layout v4",
        "preferred_resolution": list(model.native_size),
        "args": {"teachers": teachers, "model_norm": True},
    }
    if config.window is not None and config.schedule == "runs-of-5":
        entries["args"]["vitdet_num_windowed"] = 5
    return tensors, entries, notes


def _released_trunk(student: ViT) -> dict[str, Tensor]:
    own = student.state_dict()
    bias = own.pop("stem.proj.bias")
    trunk = {
        "patch_generator.pos_embed": own.pop("positions.table") + bias,
        "patch_generator.embedder.weight": own.pop("stem.proj.weight").flatten(1),
        "patch_generator.cls_token.token": own.pop("prefix")[0],
        **{name.replace(".gamma", ".grandma"): tensor for name, tensor in own.items()},
    }
    return {
        **{f"radio_model.model.{name}": tensor for name, tensor in trunk.items()},
        "radio_model.input_conditioner.norm_mean": student.normalise.mean,
        "radio_model.input_conditioner.norm_std": student.normalise.std,
        "radio_model.summary_idxs": torch.arange(student.config.class_tokens),
    }


def _released_head(head: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename a head; scale its first layer so that another epsilon gives the same layer norm."""
    scale = sqrt(_RELEASED_EPS / NORM_EPS)
    renamed = {}
    for part in ("weight", "bias"):
        renamed[f"{prefix}.fc1.{part}"] = head[f"layers.0.{part}"] * scale
        renamed[f"{prefix}.final.0.{part}"] = head[f"layers.1.{part}"]
        renamed[f"{prefix}.final.2.{part}"] = head[f"layers.3.{part}"]
    return renamed
