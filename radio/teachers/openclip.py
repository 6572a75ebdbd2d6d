"""CLIP models of open_clip as teachers: their vision transformers, with the text tower beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ..checkpoint import digest, load_state
from ..errors import CheckpointError, ConfigError, did_you_mean, require
from ..types import Features, Teacher
from . import families
from .base import Frozen, encode_batches, read_weights

# Letters: B batch, C summary width, T tokens, D token width, H W grid, N texts, L text length.

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_ANCHORS = ("visual.class_embedding",)  # a weight of every vision transformer of open_clip
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # in its archives, but no weights

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, std


@families.register("openclip")
def openclip(name: str, file: Path | None, *, after_norm: bool = True, meta: bool = False) -> Teacher:
    """Load the open_clip architecture `name` with the weights in `file`, open_clip's state dict or OpenAI's.

    Its summary is the class token after CLIP's projection, in the same space as `text`; its tokens are the
    last layer's patch tokens, not projected, after the final norm or before it (`after_norm`). It accepts
    only its native size.

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
    return Frozen(
        trunk=ClipTrunk(model.visual, after_norm=after_norm),
        name=f"openclip:{name}",
        mean=mean,
        std=std,
        native_size=(int(height), int(width)),
        patch_size=config["vision_cfg"]["patch_size"],
        fixed_size=True,
        summary_dim=config["embed_dim"],
        token_dim=config["vision_cfg"]["width"],
        text=_text_tower(library, architecture, config, model),
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
    """Build open_clip's CLIP of a configuration with weights on the meta device, to be loaded from a file."""
    with torch.device("meta"):
        model = library.CLIP(**config)
    if model.attn_mask is not None:  # not in state dicts
        length = model.context_length
        model.attn_mask = torch.full((length, length), -torch.inf).triu_(1)
    return model


@final
class ClipTrunk(nn.Module):
    """An open_clip `VisionTransformer` as a trunk: its projected class token and last-layer patch tokens."""

    def __init__(self, visual: Any, *, after_norm: bool = True) -> None:
        super().__init__()
        self.visual = visual
        self.after_norm = after_norm

    def forward(self, images: Tensor) -> Features:
        """Map normalised [B, 3, h, w] of its native size to summary [B, C] and tokens [B, T, D]."""
        outputs = self.visual.forward_intermediates(
            images, indices=1, normalize_intermediates=self.after_norm, output_fmt="NLC"
        )
        height, width = self.visual.grid_size
        return Features(outputs["image_features"], outputs["image_intermediates"][0], (height, width))


@final
class OpenClipText(nn.Module):
    """A text encoder (token ids [N, L] -> [N, C]) and its tokenizer, as the text tower of a teacher.

    The tokenizer is made at the first text; `tokenizer_name` represents it in the fingerprint.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: Callable[[], Callable[[list[str]], Tensor]], tokenizer_name: str
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer_name = tokenizer_name
        self._make_tokenizer = tokenizer
        self._fingerprints: dict[torch.dtype, str] = {}
        self.requires_grad_(False)
        self.eval()

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        return self._make_tokenizer()

    @property
    def fingerprint(self) -> str:
        """Hex hash of the tokenizer's name and the weights in their current dtype; cached per dtype."""
        dtype = next(self.encoder.parameters()).dtype
        if dtype not in self._fingerprints:
            self._fingerprints[dtype] = digest(self.encoder.state_dict(), self.tokenizer_name)
        return self._fingerprints[dtype]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as [N, C] in the summary's space, not normalised, in the weights' dtype and device.

        Raises:
            DataError: no texts.
            ConfigError: open_clip does not include the tokenizer.
        """
        device = next(self.encoder.parameters()).device
        return encode_batches(texts, lambda batch: self.encoder(self._tokenizer(batch).to(device)))

    def project(self, summaries: Tensor) -> Tensor:
        """Return the summaries [B, C] unchanged: CLIP's projection has already been applied."""
        return summaries


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


def _text_tower(library: Any, architecture: str, config: dict[str, Any], model: Any) -> OpenClipText:
    foreign = config["text_cfg"].get("hf_tokenizer_name")
    length = model.context_length

    def tokenizer() -> Callable[[list[str]], Tensor]:
        if foreign:
            raise ConfigError(
                f"openclip:{architecture} reads texts with the tokenizer {foreign}, which open_clip does not "
                "carry; its image side works, for texts take an architecture with open_clip's own tokenizer"
            )
        made: Callable[[list[str]], Tensor] = library.get_tokenizer(architecture, context_length=length)
        return made

    return OpenClipText(_TextSide(model), tokenizer, f"{foreign or 'open_clip'} {length}")


def _read_config(library: Any, architecture: str) -> dict[str, Any]:
    """Read the configuration of an architecture that can be a teacher, as keywords of open_clip's CLIP."""
    known = library.list_models()
    if architecture not in known:
        hint = did_you_mean(architecture, known)
        raise ConfigError(f"unknown open_clip architecture {architecture!r}{hint}")
    config: dict[str, Any] = library.get_model_config(architecture)
    vision = config["vision_cfg"]
    obstacle = ""
    if "timm_model_name" in vision:
        obstacle = f"its image tower is timm's {vision['timm_model_name']}"
    elif not isinstance(vision["layers"], int):
        obstacle = "its image tower is a ResNet"
    elif vision.get("attentional_pool") or "multimodal_cfg" in config:
        obstacle = "its image tower pools by attention (CoCa)"
    elif "hf_model_name" in config["text_cfg"]:
        obstacle = f"its text tower is {config['text_cfg']['hf_model_name']} of transformers"
    if obstacle:
        raise ConfigError(
            f"openclip:{architecture} cannot be a teacher: {obstacle}; those with open_clip's own vision and "
            "text transformers can: ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14, ViT-g-14, ViT-bigG-14 and kin"
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
