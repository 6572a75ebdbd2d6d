"""Build timm networks for students and teachers: without classifier and dropout, weights from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.models.efficientvit_mit import ClassifierHead as HiddenHead
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from ..checkpoint import check_finite, load_tensors
from ..errors import CheckpointError, ConfigError, SizeError, did_you_mean, shown
from ..windows import nearest_multiple


def make_network(name: str, side: int | None = None, file: Path | None = None) -> tuple[Any, int, bool]:
    """Build a timm network without classifier, dropout and stochastic depth.

    Args:
        name: timm's name.
        side: the image side in pixels to build it for; None = its own.
        file: weights in timm's layout for its own side, read without running code; None = random.

    Returns:
        The network, its side in pixels, and whether it accepts only that size.

    Raises:
        ConfigError: no such model, or one that outputs no map, or cannot be built for another size.
        CheckpointError: a file that is absent or another model's.
        SizeError: a side that its stride does not divide.
    """
    assert side is None or file is None, "weights are for the network's own size"
    check_name(name)
    own: Any = timm.create_model(name, num_classes=0) if file is None else _with_weights(name, file)
    if getattr(own, "feature_info", None) is None:
        raise ConfigError(f"timm:{name} has no maps of known size, which tokens come from; choose another")
    cfg = own.pretrained_cfg
    native: int = cfg["input_size"][1]
    fixed, stride = bool(cfg.get("fixed_input_size")), _stride(own)
    if side is None:
        side = native if fixed else nearest_multiple(native, stride)
    if side != nearest_multiple(side, stride):
        raise SizeError(
            f"timm:{name} cannot be built for {side} px: its stride of {stride} does not divide that; "
            f"the nearest is {nearest_multiple(side, stride)}"
        )
    if isinstance(
        getattr(own, "head", None), HiddenHead
    ):  # hidden layers; the paper's 38M count none of them
        own.head.reset(0, reset_other=True)
        own.head_hidden_size = own.num_features
    network = own if side == native or not fixed else _resized(name, own, side)
    _silence_drops(network)
    return network, side, fixed


def mean_and_std(network: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and std for the normalisation of the network's images."""
    mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    return tuple(mean), tuple(std)


def check_name(name: str) -> None:
    """Check that timm has a model of that name.

    Raises:
        ConfigError: it has none; suggests the nearest.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        hint = did_you_mean(name, known) or f"; timm.list_models() lists all {len(known)}"
        raise ConfigError(f"timm has no model {name[:200]!r}{hint}")


def _stride(network: Any) -> int:
    stride: int = network.feature_info[-1]["reduction"]
    return stride


def _with_weights(name: str, file: Path) -> Any:
    """Build the network with every weight from the file.

    Its classifier is loaded too and then removed: timm is strict only if the number of classes agrees.
    """
    wanted = _outline(name)
    tensors = load_tensors(file, wanted)
    cfg: Any = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else cfg.classifier[0]
    rows, own = tensors.get(f"{classifier}.weight"), wanted.get(f"{classifier}.weight")
    if rows is not None and own is not None and rows.shape[1:] != own.shape[1:]:
        raise CheckpointError(
            f"{shown(file)}: these are not the weights of timm:{name}: {classifier}.weight of shape "
            f"{tuple(rows.shape)} instead of {('classes', *own.shape[1:])}"
        )
    classes = 0 if rows is None or not rows.ndim else len(rows)
    overlay = {"state_dict": tensors, "num_classes": classes}
    try:
        network: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
        )
    except Exception as error:  # timm's conversions of layouts may raise anything on other weights
        said = shown(" ".join(str(error).split())[:300])
        raise CheckpointError(
            f"{shown(file)}: these are not the weights of timm:{name}: {said}; the file's names begin with "
            f"{', '.join(shown(key[:80]) for key in list(tensors)[:3])}"
        ) from error
    check_finite(tensors, f"{shown(file)}")
    network.reset_classifier(0)
    return network


def _outline(name: str) -> dict[str, Tensor]:
    """List the names and shapes of a timm model's weights; empty if it cannot be built on the meta device."""
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name)
    except (RuntimeError, NotImplementedError):
        return {}
    found: dict[str, Tensor] = network.state_dict()
    return found


def _resized(name: str, network: Any, side: int) -> Any:
    """Build the network for another side."""
    if isinstance(network, SwinTransformerV2):  # scales its windows with the map; img_size would pad the map
        network.set_input_size(img_size=(side, side))
        return network
    try:
        return timm.create_model(name, num_classes=0, img_size=side)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        own = network.pretrained_cfg["input_size"][1]
        raise ConfigError(f"timm:{name} is made for {own} px alone; take that resolution") from error


def _silence_drops(network: nn.Module) -> None:
    """Disable dropout and stochastic depth: they would draw from torch's global generator."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module.__dict__.get("drop_rate"), float):
            module.drop_rate = 0.0  # type: ignore[assignment]


def checkpoint_blocks(name: str, network: Any) -> None:
    """Enable timm's activation checkpointing; batch norms in its blocks then count every batch twice.

    Raises:
        ConfigError: the model does not support it.
    """
    try:
        network.set_grad_checkpointing(True)
    except AssertionError as error:  # raised by timm if unsupported
        raise ConfigError(
            f"timm:{name} cannot recompute its activations; leave --options.activation-checkpointing out"
        ) from error
