"""The image encoders of transformers as trunks, and how each model type becomes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import Features

# Letters: B batch, C summary width, T tokens, P class and register tokens before them, D token width,
# H W grid, h w pixels.


@final
class HfTrunk(nn.Module):
    """An image encoder of transformers as a trunk.

    Args:
        network: maps `inputs(images)` to an output with `hidden_states`, or, without blocks, with
            `last_hidden_state`: [B, P + T, D] or [B, H, W, D].
        norm: applied to each of these.
        summary: maps them after the norm [B, P + T, D] to the summary [B, C].
        inputs: makes the network's arguments of normalised images [B, 3, h, w].
        num_blocks: number of its blocks; 0 for a pyramid, whose blocks differ in their grids.
        native_side: the side in pixels for which it was made, and which `preprocessor_config.json` must
            name; None where that file may choose.
        fixed_size: it accepts only its native side.
    """

    def __init__(
        self,
        network: Any,
        *,
        norm: nn.Module | None = None,
        summary: nn.Module,
        inputs: Callable[[Tensor], Mapping[str, Any]] | None = None,
        num_prefix: int = 0,
        num_blocks: int,
        patch_size: int,
        token_dim: int,
        summary_dim: int | None = None,
        native_side: int | None = None,
        fixed_size: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.norm = norm or nn.Identity()
        self.summary = summary
        self.inputs = inputs or _pixel_values
        self.num_prefix, self.num_blocks = num_prefix, num_blocks
        self.patch_size, self.token_dim = patch_size, token_dim
        self.summary_dim = summary_dim or token_dim
        self.native_side, self.fixed_size = native_side, fixed_size

    def forward(self, images: Tensor) -> Features:
        """Compute the features of normalised images [B, 3, h, w]."""
        if self.num_blocks:
            return self.intermediate(images, [self.num_blocks - 1])[0]
        return self._features(self.network(**self.inputs(images)).last_hidden_state, images)

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Compute the features after each of the given blocks."""
        wanted = [block + 1 for block in blocks]  # the state before the first block is number 0
        states = self.network(**self.inputs(images), output_hidden_states=wanted).hidden_states
        return [self._features(states[index], images) for index in wanted]

    def _features(self, hidden: Tensor, images: Tensor) -> Features:
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        hidden = self.norm(hidden.flatten(1, -2))
        return Features(self.summary(hidden), hidden[:, self.num_prefix :], grid)


def _pixel_values(images: Tensor) -> dict[str, Any]:
    return {"pixel_values": images}


def _interpolated(images: Tensor) -> dict[str, Any]:
    """Ask for the positions of the images' grid instead of the native one."""
    return {"pixel_values": images, "interpolate_pos_encoding": True}


def _as_patches(patch: int, images: Tensor) -> dict[str, Any]:
    """Cut images into patches [B, T, patch * patch * 3], as SigLIP 2 NaFlex takes them."""
    batch, channels, height, width = images.shape
    grid = (height // patch, width // patch)
    cut = images.reshape(batch, channels, grid[0], patch, grid[1], patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cut.reshape(batch, grid[0] * grid[1], patch * patch * channels),
        "pixel_attention_mask": None,  # no patch is padding
        "spatial_shapes": np.array([grid] * batch),  # a tensor would be copied to the host for its numbers
    }


@final
class _ClassTokens(nn.Module):
    """The class tokens with these indices, concatenated, maybe projected: [B, P + T, D] -> [B, C]."""

    def __init__(self, indices: Sequence[int] = (0,), projection: nn.Module | None = None) -> None:
        super().__init__()
        self.indices = tuple(indices)
        self.projection = projection or nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = torch.cat([hidden[:, index] for index in self.indices], dim=-1)
        summary: Tensor = self.projection(tokens)
        return summary


@final
class _MeanToken(nn.Module):
    """The mean of the tokens: [B, T, D] -> [B, D]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1)


def _take(network: Any, name: str) -> nn.Module:
    """Move a module out of a network, which from then on leaves that step out."""
    module: nn.Module = getattr(network, name)
    setattr(network, name, nn.Identity())
    return module


def _vit(network: Any, norm: str, *, num_registers: int = 0, built_for_size: bool = False) -> HfTrunk:
    """Make the trunk of a transformer whose summary is its class token; `norm` names its final norm."""
    config = network.config
    return HfTrunk(
        network,
        norm=_take(network, norm),
        summary=_ClassTokens(),
        inputs=_interpolated if built_for_size else None,
        num_prefix=1 + num_registers,
        num_blocks=config.num_hidden_layers,
        patch_size=_one_side(config.patch_size),
        token_dim=config.hidden_size,
        native_side=_one_side(config.image_size) if built_for_size else None,
    )


def _clip(vision: Any, projection: nn.Linear | None = None) -> HfTrunk:
    config = vision.config
    return HfTrunk(
        vision,
        norm=_take(vision, "post_layernorm"),
        summary=_ClassTokens(projection=projection),
        inputs=_interpolated,
        num_prefix=1,
        num_blocks=config.num_hidden_layers,
        patch_size=_one_side(config.patch_size),
        token_dim=config.hidden_size,
        summary_dim=None if projection is None else projection.out_features,
        native_side=_one_side(config.image_size),
    )


def _siglip(vision: Any, *, flexible: bool = False) -> HfTrunk:
    config = vision.config
    if not vision.use_head:
        raise ConfigError(
            "its vision_use_head is false: without a pooling head it has no summary; take the whole SigLIP"
        )
    vision.use_head = False  # the trunk calls it
    patch = _one_side(config.patch_size)
    return HfTrunk(
        vision,
        norm=_take(vision, "post_layernorm"),
        summary=_take(vision, "head"),
        inputs=partial(_as_patches, patch) if flexible else _interpolated,
        num_blocks=config.num_hidden_layers,
        patch_size=patch,
        token_dim=config.hidden_size,
        native_side=None if flexible else _one_side(config.image_size),
    )


def _radio(network: Any) -> HfTrunk:
    config = network.config
    return HfTrunk(
        network,
        summary=_ClassTokens(config.summary_idxs),
        num_prefix=config.num_summary_tokens,
        num_blocks=config.num_hidden_layers,
        patch_size=config.patch_size,
        token_dim=config.hidden_size,
        summary_dim=len(config.summary_idxs) * config.hidden_size,
    )


def _convnext(network: Any) -> HfTrunk:
    config = network.config
    return HfTrunk(
        network,
        summary=_ClassTokens(),
        num_prefix=1,
        num_blocks=0,
        patch_size=2 ** (config.num_stages + 1),
        token_dim=config.hidden_sizes[-1],
    )


def _sam(network: Any) -> HfTrunk:
    """Make the trunk of SAM's image encoder, without its neck."""
    _take(network.vision_encoder, "neck")
    return _sam3(network.vision_encoder)


def _sam3(network: Any) -> HfTrunk:
    """Make the trunk of a transformer without class token and final norm; its summary is the mean token."""
    config = network.config
    return HfTrunk(
        network,
        summary=_MeanToken(),
        num_blocks=config.num_hidden_layers,
        patch_size=_one_side(config.patch_size),
        token_dim=config.hidden_size,
        native_side=_one_side(config.image_size),
        fixed_size=True,
    )


def _hiera(network: Any) -> HfTrunk:
    """Make the trunk of SAM 2's image encoder; the tokens are those of its last stage."""
    config = network.config
    return HfTrunk(
        network,
        summary=_MeanToken(),
        num_blocks=0,
        patch_size=config.patch_stride[0] * config.query_stride[0] ** config.num_query_pool_stages,
        token_dim=config.embed_dim_per_stage[-1],
        native_side=_one_side(config.image_size),
        fixed_size=True,
    )


def _one_side(size: Any) -> int:
    """Return the side of a square size: an integer, or two equal ones."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"a patch or image of {list(size)} pixels is not square; wanted a square one")
    return int(sides.pop())


@dataclass(frozen=True, kw_only=True, slots=True)
class HfKind:
    """How a model type becomes a teacher."""

    network: str  # transformers' class
    trunk: Callable[[Any], HfTrunk]
    options: Mapping[str, Any] = field(default_factory=dict)  # for the class
    config: tuple[str, ...] = ()  # path to the part's configuration in the whole one
    prefix: str = ""  # of the part's weights in the files; other weights are left out
    unused: tuple[str, ...] = ()  # beginnings of the names of weights after the features, such as classifiers
    has_text: bool = False
    normalises: bool = False  # the network normalises the images itself


_SAM2 = HfKind(
    network="Sam2HieraDetModel",
    trunk=_hiera,
    config=("vision_config", "backbone_config"),
    prefix="vision_encoder.backbone.",
)
KINDS = {
    "dinov2": HfKind(
        network="Dinov2Model", trunk=lambda net: _vit(net, "layernorm"), unused=("classifier.",)
    ),
    "dinov2_with_registers": HfKind(
        network="Dinov2WithRegistersModel",
        trunk=lambda net: _vit(net, "layernorm", num_registers=net.config.num_register_tokens),
        unused=("classifier.",),
    ),
    "dinov3_vit": HfKind(
        network="DINOv3ViTModel",
        trunk=lambda net: _vit(net, "norm", num_registers=net.config.num_register_tokens),
    ),
    "dinov3_convnext": HfKind(network="DINOv3ConvNextModel", trunk=_convnext),
    "vit": HfKind(
        network="ViTModel",
        trunk=lambda net: _vit(net, "layernorm", built_for_size=True),
        options={"add_pooling_layer": False},
        unused=("classifier.", "pooler.", "vit.pooler."),
    ),
    "clip": HfKind(
        network="CLIPModel",
        trunk=lambda net: _clip(net.vision_model, net.visual_projection),
        has_text=True,
    ),
    "clip_vision_model": HfKind(network="CLIPVisionModel", trunk=_clip),
    "siglip": HfKind(network="SiglipModel", trunk=lambda net: _siglip(net.vision_model), has_text=True),
    "siglip_vision_model": HfKind(network="SiglipVisionModel", trunk=_siglip),
    "siglip2": HfKind(
        network="Siglip2Model", trunk=lambda net: _siglip(net.vision_model, flexible=True), has_text=True
    ),
    "siglip2_vision_model": HfKind(network="Siglip2VisionModel", trunk=partial(_siglip, flexible=True)),
    "sam": HfKind(
        network="SamVisionModel",
        trunk=_sam,
        config=("vision_config",),
        unused=("mask_decoder.", "prompt_encoder.", "shared_image_embedding."),
    ),
    "sam2": _SAM2,
    "sam2_video": _SAM2,
    "sam3": HfKind(
        network="Sam3ViTModel",
        trunk=_sam3,
        config=("vision_config", "backbone_config"),
        prefix="vision_encoder.backbone.",
    ),
    "sam3_video": HfKind(
        network="Sam3ViTModel",
        trunk=_sam3,
        config=("detector_config", "vision_config", "backbone_config"),
        prefix="detector_model.vision_encoder.backbone.",
    ),
    "radio": HfKind(network="RadioModel", trunk=_radio, normalises=True),
}
PROJECTED = HfKind(  # the other class with the model type clip_vision_model
    network="CLIPVisionModelWithProjection", trunk=lambda net: _clip(net.vision_model, net.visual_projection)
)
