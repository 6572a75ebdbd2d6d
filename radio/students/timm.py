"""Students from timm: any of its models, with the last map as tokens and the pooled vector as summary."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import timm
import torch
from timm.layers.drop import DropPath
from timm.models.beit import Beit
from timm.models.efficientvit_mit import ClassifierHead as HiddenHead
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from ..checkpoint import check_finite, digest, list_first, load_tensors
from ..config import Pixels
from ..errors import CheckpointError, ConfigError, SizeError, did_you_mean, shown
from ..nn.hybrid import Neck
from ..nn.vit import Normalise
from ..ops import check_blocks, nearest_multiple
from ..types import Features
from . import TABLE_6, StudentOptions, students

# Letters: B batch, C summary width, T tokens, D token width, H W grid.

_TABLE_SIDE = 224  # pixels: the paper compares them all at this size

# timm's modules whose models resample their positions to any grid if they are built for that.
_RESAMPLING = ("vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva")

_VITS = (VisionTransformer, Eva, NaFlexVit, Beit, VisionTransformerRelPos)  # sequences of equal blocks


def make_network(
    name: str, side: int | None = None, file: Path | None = None, *, meta: bool = False
) -> tuple[Any, int, bool]:
    """Build a timm network without classifier, dropout and stochastic depth.

    ViTs that timm can build for any multiple of their patch are built so. They resample their table of
    positions as timm does; C-RADIO's, which timm's class of that name resamples once while it is loaded,
    is built as the NaFlex model of the same weights, which keeps all 128 x 128 positions.

    Args:
        name: timm's name.
        side: the image side in pixels to build it for; None = its own.
        file: weights in timm's layout for its own side, read without running code; None = random.
        meta: build it on the meta device, without reading the file.

    Returns:
        The network, its side in pixels, and whether it accepts only that size.

    Raises:
        ConfigError: no such model, or one that outputs no map or no pooled vector, or cannot be built for
            another size.
        CheckpointError: a file that is absent or another model's.
        SizeError: a side that its stride does not divide.
    """
    assert side is None or file is None, "weights are for the network's own size"
    check_name(name)
    defaults: Any = timm.get_pretrained_cfg(name)
    if defaults.classifier is None:  # encoders of language models
        raise ConfigError(f"timm:{name} pools no vector, which the summary comes from; choose another model")
    sizes = size_options(name)
    if meta:
        own: Any = _outline(name)
        own.reset_classifier(0)
    else:
        own = timm.create_model(name, num_classes=0, **sizes) if file is None else _with_weights(name, file)
    if getattr(own, "feature_info", None) is None:
        raise ConfigError(f"timm:{name} has no maps of known size, which tokens come from; choose another")
    cfg = own.pretrained_cfg
    native: int = cfg["input_size"][1]
    fixed, stride = bool(cfg.get("fixed_input_size")) and not sizes, int(own.feature_info[-1]["reduction"])
    own_side = native if fixed else nearest_multiple(native, stride)
    if side is None:
        side = own_side
    if side != nearest_multiple(side, stride):
        raise SizeError(
            f"timm:{name} cannot be built for {side} px: its stride of {stride} does not divide that; "
            f"the nearest is {nearest_multiple(side, stride)}"
        )
    if isinstance(getattr(own, "head", None), HiddenHead):  # its hidden layers are not in the paper's 38M
        own.head.reset(0, reset_other=True)
        own.head_hidden_size = own.num_features
    has_sides = fixed or "dynamic_img_size" in sizes  # a table of positions or windows made for one size
    network = _resized(name, own, side) if has_sides and side != own_side else own
    _silence_drops(network)
    return network, side, fixed


def mean_and_std(network: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and std for the normalisation of the network's images."""
    mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    return tuple(mean), tuple(std)


def check_name(name: str) -> None:
    """Check that timm has a model of that name, and settings for its tag if it has one (`NAME.TAG`).

    Raises:
        ConfigError: it has none; suggests the nearest.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        hint = did_you_mean(name, known) or f"; timm.list_models() lists all {len(known)}"
        raise ConfigError(f"timm has no model {name[:200]!r}{hint}")
    model, dot, _ = name.partition(".")
    tags = timm.list_models(f"{model}.*", include_tags=True) if dot else []
    if dot and name not in tags:
        raise ConfigError(f"timm has no weights {name[:200]!r}; known: {', '.join([model, *tags])}")


def size_options(name: str) -> dict[str, Any]:
    """Return timm's options with which a model takes every size; empty if it has none."""
    package, _, module = timm.model_entrypoint(name).__module__.rpartition(".")
    if package != "timm.models" or module not in _RESAMPLING:
        return {}
    return {"use_naflex": True} if "_radio_" in name else {"dynamic_img_size": True}


def _with_weights(name: str, file: Path) -> Any:
    """Build the network with every weight from the file.

    Its classifier is loaded too and then removed: timm is strict only if the number of classes agrees.
    """
    outline = _outline(name)
    wanted = outline.state_dict()
    tensors = load_tensors(file, wanted)
    if "patch_generator.embedder.weight" in tensors:  # timm knows C-RADIO's own layout by its whole prefix
        tensors = {f"radio_model.model.{key}": tensor for key, tensor in tensors.items()}
    cfg: Any = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else cfg.classifier[0]
    rows, own = tensors.get(f"{classifier}.weight"), wanted.get(f"{classifier}.weight")
    if rows is not None and own is not None and rows.shape[1:] != own.shape[1:]:
        raise CheckpointError(
            f"{shown(file)}: these are not the weights of timm:{name}: {classifier}.weight of shape "
            f"{tuple(rows.shape)} instead of {('classes', *own.shape[1:])}"
        )
    classes = 0 if rows is None or not rows.ndim else len(rows)
    packed = [key for key in tensors if key in wanted and not tensors[key].is_floating_point()]
    packed = [key for key in packed if wanted[key].is_floating_point()]
    if packed:
        raise _not_its_weights(name, file, tensors, list_first("not floating-point", packed))
    missing = [key for key in wanted if key not in tensors and not key.startswith(f"{classifier}.")]
    if "siglip" in name and getattr(outline, "attn_pool", None) is None and missing:
        # Their files hold a pool that these lack, so timm is not strict, and would leave others random.
        raise _not_its_weights(name, file, tensors, list_first("missing", missing))
    overlay = {"state_dict": tensors, "num_classes": classes}
    try:
        network: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **size_options(name)
        )
    except Exception as error:  # timm's conversions of layouts may raise anything on other weights
        reason = _mismatches(error)
        if "embeds.pos_embed" in reason and "use_naflex" in size_options(name):
            reason += " (positions resampled for one size; take NVIDIA's file, or that of naflexvit_…)"
        raise _not_its_weights(name, file, tensors, reason) from error
    check_finite(network.state_dict(), shown(file))  # in its dtype: a double may be too large for a float
    network.reset_classifier(0)
    return network


def _not_its_weights(name: str, file: Path, tensors: dict[str, Tensor], reason: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(file)}: these are not the weights of timm:{name}: {reason}; the file's names begin with "
        f"{', '.join(shown(key[:80]) for key in list(tensors)[:3])}"
    )


def _mismatches(error: Exception) -> str:
    """List the first weights that `load_state_dict`'s error names; return the text of any other error."""
    text = str(error)
    lists = {
        kind: re.findall(r'"([^"]+)"', text.partition(f"{kind} key(s) in state_dict:")[2].partition("\n")[0])
        for kind in ("Missing", "Unexpected")
    }
    lists["misshapen"] = [
        f"{key} ({given}) instead of ({expected})"
        for key, given, expected in re.findall(
            r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)", text
        )
    ]
    parts = [list_first(kind.lower(), names) for kind, names in lists.items()]
    return "; ".join(part for part in parts if part) or shown(" ".join(text.split())[:300])


def _outline(name: str) -> Any:
    """Build a timm model, with its classifier, on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, **size_options(name))


def _resized(name: str, network: Any, side: int) -> Any:
    """Build the network for another side."""
    if isinstance(network, SwinTransformerV2):  # scales its windows with the map; img_size would pad the map
        network.set_input_size(img_size=(side, side))
        return network
    try:
        return timm.create_model(name, num_classes=0, img_size=side, **size_options(name))
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


@final
class TimmTrunk(nn.Module):
    """A timm network without its classifier that maps normalised images to `Features`.

    The tokens are timm's `forward_features` without class and register tokens: after the final norm, unless
    timm applies that norm to the pooled vector alone (`fc_norm`, most CNNs). The summary is what timm pools.

    Args:
        name: timm's name of it.
        network: a network from `make_network`.
        upsample: add a neck that sums the last map, at twice its resolution, and the map of the stage before.

    Raises:
        ConfigError: up-sampling for a network whose stages do not halve the map one after the other.
    """

    def __init__(self, name: str, network: Any, *, upsample: bool = False) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.stride: int = network.feature_info[-1]["reduction"]
        self.num_blocks: int = len(network.blocks) if isinstance(network, _VITS) else 0
        self.token_dim: int = network.num_features
        self.summary_dim: int = getattr(network, "head_hidden_size", network.num_features)
        self.neck = Neck(_width_before(name, network), self.token_dim, "lateral") if upsample else None

    def forward(self, images: Tensor) -> Features:
        """Map normalised [B, 3, h, w] to the last map's tokens [B, T, D] and its pooled vector [B, C]."""
        grid = self._grid(images)
        if self.neck is None:
            last, maps = self.network.forward_features(images), []
        else:
            last, maps = self.network.forward_intermediates(images, indices=2)
        tokens = self._tokens(last, grid)
        if self.neck is not None:
            plane = self.neck(maps[0], tokens.transpose(1, 2).unflatten(2, grid))
            tokens, grid = plane.flatten(2).transpose(1, 2), tuple(plane.shape[2:])
        return Features(self.network.forward_head(last, pre_logits=True), tokens, grid)

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Compute a ViT's features after each of the given blocks, as if it were the last."""
        grid, order = self._grid(images), sorted(set(blocks))
        prefixed = self.network.num_prefix_tokens > 0  # EVA fails if asked for prefix tokens that it lacks
        outputs = self.network.forward_intermediates(
            images,
            indices=order,
            return_prefix_tokens=prefixed,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if prefixed:
            outputs = [torch.cat((prefix, tokens), dim=1) for tokens, prefix in outputs]
        return [
            Features(self.network.forward_head(last, pre_logits=True), self._tokens(last, grid), grid)
            for last in (outputs[order.index(block)] for block in blocks)
        ]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.stride, images.shape[3] // self.stride

    def _tokens(self, last: Any, grid: tuple[int, int]) -> Tensor:
        """Convert [B, D, H, W], [B, H, W, D] or [B, prefix + T, D] to tokens [B, T, D]."""
        tokens: Tensor | None = None
        if isinstance(last, Tensor) and last.ndim == 3:
            tokens = last[:, getattr(self.network, "num_prefix_tokens", 0) :]
        elif isinstance(last, Tensor):
            channels_first = getattr(self.network, "output_fmt", "NCHW") == "NCHW"
            tokens = last.flatten(2).transpose(1, 2) if channels_first else last.flatten(1, 2)
        if tokens is None or tokens.shape[1:] != (grid[0] * grid[1], self.token_dim):
            given = list(last.shape) if isinstance(last, Tensor) else type(last).__name__
            raise ConfigError(
                f"timm:{self.name} gives {given} where {grid[0]}x{grid[1]} tokens of {self.token_dim} were "
                f"expected: it has no map for a student; choose another model"
            )
        return tokens


@final
class TimmStudent(nn.Module):
    """A timm network as a student.

    Args:
        trunk: the network.
        native: the image side in pixels that it is built for.
        fixed_size: whether it accepts only that size.
    """

    window = with_window = None

    def __init__(self, trunk: TimmTrunk, native: int, *, fixed_size: bool) -> None:
        super().__init__()
        self.name = f"timm:{trunk.name}"
        self.trunk, self.native_size, self.fixed_size = trunk, (native, native), fixed_size
        self.num_blocks = trunk.num_blocks
        self.patch_size = trunk.stride // (1 if trunk.neck is None else 2)
        self.summary_dim, self.token_dim = trunk.summary_dim, trunk.token_dim
        pooled = trunk.neck is None and trunk.summary_dim == trunk.token_dim
        self.summary_tokens = int(pooled and getattr(trunk.network, "attn_pool", None) is None)
        self.mean_std = mean_and_std(trunk.network)
        self.normalise = Normalise(*self.mean_std)

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the name, the normalisation and, if fixed, the image size."""
        built = self.native_size[0] if self.fixed_size else "any"
        return digest(self.state_dict(), f"{self.name} {built} {self.mean_std}")

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the nearest (height, width) that its stride divides, or the only size that it accepts."""
        if self.fixed_size:
            return self.native_size
        return nearest_multiple(height, self.trunk.stride), nearest_multiple(width, self.trunk.stride)

    def sample_crops(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Return None: a training forward draws nothing at random; dropout and stochastic depth are off."""
        return None

    def forward(self, images: Tensor, crops: Tensor | None = None) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]; `crops` are ignored.

        Raises:
            SizeError: a size that it does not accept; names the nearest that it does.
        """
        features: Features = self.trunk(self._checked(images))
        return features

    @property
    def intermediate(self) -> Callable[[Tensor, Sequence[int]], list[Features]] | None:
        """Method that computes a ViT's features after given blocks (see `Encoder`); None for the others."""
        return self._intermediate if self.num_blocks else None

    def _intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        check_blocks(blocks, self.num_blocks, self.name)
        return self.trunk.intermediate(self._checked(images), blocks)

    def _checked(self, images: Tensor) -> Tensor:
        """Check the images' size and normalise them."""
        height, width = images.shape[-2:]
        h, w = self.nearest_size(height, width)
        if (h, w) != (height, width):
            why = (
                f"it was built for {h}x{w} px alone; build it for another size with --student.image-size"
                if self.fixed_size
                else f"its stride of {self.trunk.stride} does not divide that; the nearest size is {h}x{w}"
            )
            raise SizeError(f"{self.name} cannot take {height}x{width} px: {why}")
        normalised: Tensor = self.normalise(images)
        return normalised


def _width_before(name: str, network: Any) -> int:
    """Return the channels of the map at twice the resolution of the last; ConfigError if there is none."""
    stages = [(stage["reduction"], stage["num_chs"]) for stage in network.feature_info]
    if len(stages) < 2 or stages[-2][0] * 2 != stages[-1][0]:
        raise ConfigError(
            f"timm:{name} has no stage at twice the last one's resolution; leave --student.upsample out"
        )
    return int(stages[-2][1])


@dataclass(frozen=True, kw_only=True, slots=True)
class TimmOptions(StudentOptions):
    """Options of timm's models as students."""

    upsample: bool | None = None  # add a neck of twice the resolution; None = no
    image_size: Pixels | None = None  # side in pixels that it is built for; None = its own


def _build(name: str, side: int | None, options: TimmOptions) -> TimmStudent:
    """Build a timm student with a recipe's options; `side` is the registered name's default."""
    network, native, fixed = make_network(name, options.image_size or side)
    if options.activation_checkpointing:
        try:
            network.set_grad_checkpointing(True)  # batch norms in its blocks then count every batch twice
        except AssertionError as error:  # raised by timm if unsupported
            raise ConfigError(
                f"timm:{name} cannot recompute its activations; leave --student.activation-checkpointing out"
            ) from error
    return TimmStudent(TimmTrunk(name, network, upsample=bool(options.upsample)), native, fixed_size=fixed)


def _find(name: str) -> functools.partial[TimmStudent]:
    check_name(name)
    return functools.partial(_build, name, None)


for _name in TABLE_6:
    students.add(f"timm:{_name}", functools.partial(_build, _name, _TABLE_SIDE))
students.add_family("timm", _find)
