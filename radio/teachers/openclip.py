"""CLIP and SigLIP models of open_clip as teachers: their vision transformers and their text towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..checkpoint import load_state
from ..errors import CheckpointError, ConfigError, did_you_mean, require
from ..types import Features, Teacher
from . import families
from .base import ClipText, Frozen, read_weights
from .hf import hash_tokenizer, read_tokenizer

# Letters: B batch, C summary width, T tokens, D token width, H W grid, N texts, L text length.

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_ANCHORS = ("visual.class_embedding", "visual.trunk.pos_embed")
"""Weights of every image tower have one of these names: open_clip's own vision transformer, or timm's."""

_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # in its archives, but no weights

_ONLY_FROM_THE_FOLDER = {"local_files_only": True, "trust_remote_code": False}

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, std


@families.register("openclip")
def openclip(name: str, file: Path | None, *, after_norm: bool = True, meta: bool = False) -> Teacher:
    """Load the open_clip architecture `name` with the weights in `file`, open_clip's state dict or OpenAI's.

    Its summary is the class token after CLIP's projection, or SigLIP's pooled vector, in the same space as
    `text`; its tokens are the last layer's patch tokens, not projected, after the final norm or before it
    (`after_norm`). It accepts only its native size. A tokenizer that open_clip does not include, such as
    SigLIP's, is read from the weights' folder, where that of the Hugging Face repository has it.

    Weights trained with QuickGELU (OpenAI's, MetaCLIP's, DFN's) need the architecture whose name ends in
    `-quickgelu`: the plain one loads them too, but the features are wrong, and no shape reveals it. With
    open_clip's tag after a slash, as in `ViT-L-14/laion2b_s32b_b82k`, this is checked and the tag's mean and
    std are used; without a tag they are those that all open_clip tags of this architecture share, or
    OpenAI's.

    Raises:
        ConfigError: no such architecture or tag, one without a vision transformer, or the wrong GELU.
        CheckpointError: no file, or not the weights of this architecture.
        MissingExtraError: open_clip is not installed.
    """
    library = require("open_clip", extra="zeroshot")
    architecture, _, tag = name.partition("/")
    config = _read_config(library, architecture)
    # Checks the tag before the file.
    mean, std = _read_normalisation(library, architecture, tag, bool(config.get("quick_gelu")))
    model = build_clip(library, config)
    if not meta:
        load_state(model, _read_tensors(name, file, config), f"openclip:{name}@{file}")
    height, width = model.visual.image_size
    tower = _describe_tower(model.visual, config)
    return Frozen(
        trunk=ClipTrunk(model.visual, tower.grid, after_norm=after_norm),
        name=f"openclip:{name}",
        mean=mean,
        std=std,
        native_size=(int(height), int(width)),
        patch_size=tower.patch_size,
        fixed_size=True,
        summary_dim=config["embed_dim"],
        token_dim=tower.width,
        text=_text_tower(library, architecture, config, model, file),
        variant=f"after_norm={after_norm}",
        weights_file=file,
    )


def _read_tensors(name: str, file: Path | None, config: dict[str, Any]) -> dict[str, Tensor]:
    """Read open_clip's or OpenAI's state dict."""
    spec = f"openclip:{name}"
    tensors = read_weights(spec, file, _ANCHORS)
    if not tensors.keys().isdisjoint(_OPENAI_SIZES) and not config.get("quick_gelu"):
        raise CheckpointError(
            f"{spec}@{file}: these are OpenAI's own weights, trained with QuickGELU; name them "
            f"openclip:{name.partition('/')[0]}-quickgelu@{file}"
        )
    for key in _OPENAI_SIZES:
        tensors.pop(key, None)
    scale = tensors.get("logit_scale")
    if scale is not None and scale.numel() == 1:
        tensors["logit_scale"] = scale.reshape(())  # some releases store it as [1]
    return tensors


def build_clip(library: Any, config: dict[str, Any]) -> Any:
    """Build the model of a configuration with weights on the meta device, to be loaded from a file."""
    config = dict(config)
    custom = config.pop("custom_text", False)  # such as SigLIP's, without a causal mask
    with torch.device("meta"):
        model = (library.CustomTextCLIP if custom else library.CLIP)(**config)
    tower = model.text if custom else model
    if tower.attn_mask is not None:  # not in state dicts
        length = len(tower.attn_mask)
        tower.attn_mask = torch.full((length, length), -torch.inf).triu_(1)
    return model


class _Tower(NamedTuple):
    """The shape of an image tower."""

    grid: tuple[int, int]
    patch_size: int
    width: int


def _describe_tower(visual: Any, config: dict[str, Any]) -> _Tower:
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        stem = visual.trunk.patch_embed
        return _Tower(stem.grid_size, stem.patch_size[0], visual.trunk.embed_dim)
    return _Tower(visual.grid_size, vision["patch_size"], vision["width"])


@final
class ClipTrunk(nn.Module):
    """An image tower of open_clip as a trunk: the vector that CLIP compares, and last-layer patch tokens.

    Args:
        visual: a `VisionTransformer`, or a `TimmModel` around timm's.
        grid: of its patches at its only size.
        after_norm: whether the tokens are those after the final norm.
    """

    def __init__(self, visual: Any, grid: tuple[int, int], *, after_norm: bool = True) -> None:
        super().__init__()
        self.visual = visual
        self.grid = grid
        self.after_norm = after_norm
        own = getattr(visual, "transformer", None)  # timm's towers, of SigLIP, have none
        self.num_blocks: int = 0 if own is None else own.layers

    def forward(self, images: Tensor) -> Features:
        """Map normalised [B, 3, h, w] of its native size to summary [B, C] and tokens [B, T, D]."""
        outputs = self.visual.forward_intermediates(
            images, indices=1, normalize_intermediates=self.after_norm, output_fmt="NLC"
        )
        return Features(outputs["image_features"], outputs["image_intermediates"][0], self.grid)

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Compute the features after each of the given blocks, as if it were the last."""
        order = sorted(set(blocks))
        outputs = self.visual.forward_intermediates(
            images,
            indices=order,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens, prefixes = outputs["image_intermediates"], outputs["image_intermediates_prefix"]
        return [self._features(prefixes[i], tokens[i]) for i in map(order.index, blocks)]

    def _features(self, prefix: Tensor, tokens: Tensor) -> Features:
        """Pool and project a block's output as the last one's is; `ln_post` is the final norm."""
        pooled, _ = self.visual._pool(torch.cat((prefix, tokens), dim=1))
        tokens = self.visual.ln_post(tokens) if self.after_norm else tokens
        return Features(pooled @ self.visual.proj, tokens, self.grid)


@final
class _TextSide(nn.Module):
    """open_clip's CLIP without its image tower, mapping token ids [N, L] to [N, C]."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        clip.visual = nn.Identity()
        self.clip = clip

    def forward(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self.clip.encode_text(ids)
        return vectors


def _text_tower(
    library: Any, architecture: str, config: dict[str, Any], model: Any, file: Path | None
) -> ClipText:
    foreign = config["text_cfg"].get("hf_tokenizer_name")
    length = model.context_length
    folder = Path() if file is None else file.parent  # of a tokenizer that open_clip does not include

    def tokenizer() -> Callable[[list[str]], Tensor]:
        made: Callable[[list[str]], Tensor]
        if foreign:
            try:
                read_tokenizer(folder, length, config["text_cfg"]["vocab_size"])
            except CheckpointError as error:
                raise CheckpointError(
                    f"openclip:{architecture} reads texts with the tokenizer {foreign}, which open_clip does "
                    f"not carry; put the tokenizer files of that repository beside the weights: {error}"
                ) from error
            options = config["text_cfg"].get("tokenizer_kwargs", {}) | _ONLY_FROM_THE_FOLDER
            made = library.tokenizer.HFTokenizer(str(folder), context_length=length, **options)
        else:
            made = library.get_tokenizer(architecture, context_length=length)
        return made

    name = f"{foreign} {hash_tokenizer(folder)}" if foreign else "open_clip"
    return ClipText(_TextSide(model), tokenizer, f"{name} {length}")


def _read_config(library: Any, architecture: str) -> dict[str, Any]:
    """Read the configuration of an architecture that can be a teacher, as keywords of open_clip's models."""
    known = library.list_models()
    if architecture not in known:
        hint = did_you_mean(architecture, known)
        raise ConfigError(f"unknown open_clip architecture {architecture!r}{hint}")
    config: dict[str, Any] = library.get_model_config(architecture)
    vision = config["vision_cfg"]
    obstacle = ""
    timm_model = vision.get("timm_model_name")
    bidirectional = config["text_cfg"].get("no_causal_mask", False)
    if timm_model and (vision.get("timm_pool") != "map" or not bidirectional):  # not SigLIP's
        obstacle = f"its image tower is timm's {timm_model}"
    elif not timm_model and not isinstance(vision["layers"], int):
        obstacle = "its image tower is a ResNet"
    elif vision.get("attentional_pool") or "multimodal_cfg" in config:
        obstacle = "its image tower pools by attention (CoCa)"
    elif "hf_model_name" in config["text_cfg"]:
        obstacle = f"its text tower is {config['text_cfg']['hf_model_name']} of transformers"
    if obstacle:
        raise ConfigError(
            f"openclip:{architecture} cannot be a teacher: {obstacle}; those with open_clip's own vision and "
            "text transformers can: ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14, ViT-g-14, ViT-bigG-14 and kin; "
            "and SigLIP's: ViT-B-16-SigLIP, ViT-B-16-SigLIP2 and kin"
        )
    return config


def _read_normalisation(library: Any, architecture: str, tag: str, quick_gelu: bool) -> Normalisation:
    """Read mean and std of a tag, or those that all tags of an architecture share, else OpenAI's."""
    tags = library.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        hint = did_you_mean(tag, tags) or f"; known: {', '.join(tags) or 'none'}"
        raise ConfigError(f"open_clip knows no weights {tag!r} of {architecture}{hint}")
    configs = [library.get_pretrained_cfg(architecture, each) for each in ([tag] if tag else tags)]
    if tag and configs[0].get("quick_gelu", False) != quick_gelu:
        other = architecture.removesuffix("-quickgelu") if quick_gelu else f"{architecture}-quickgelu"
        raise ConfigError(
            f"the weights {tag!r} were not trained with the GELU of {architecture}; name it {other}/{tag}"
        )
    pairs = {(tuple(each["mean"]), tuple(each["std"])) for each in configs}
    return pairs.pop() if len(pairs) == 1 else (OPENAI_MEAN, OPENAI_STD)
