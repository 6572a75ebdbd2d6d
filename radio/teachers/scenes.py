"""The three tiny teachers included in the package, trained on the generated scenes.

- `scenes:clip`: a ViT (96 px, patch 12) and a text transformer; summary = class token in their common space.
- `scenes:dense`: a ViT (108 px, patch 12) with supervision of its class token and every patch. It
  replaces a self-supervised encoder, but is not one.
- `scenes:sam`: segment_anything's image encoder (112 px, patch 8); tokens before the neck, summary = mean.

Each file's metadata records how it was made; tools/scene_teachers makes them again. `scene_variants` has the
same teachers with one known flaw each: `scenes:clip-scaled`, `scenes:sam-scaled`, `scenes:dense-noisy`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, digest, load, load_state
from ..errors import RadioError, did_you_mean, require
from ..io import brief
from ..nn.vit import IMAGENET_MEAN, IMAGENET_STD
from ..scenes.language import VOCABULARY
from ..students.vit import ViT, ViTConfig
from ..types import Features
from . import families
from .base import Frozen, find_member, refuse_file
from .sam import SamTrunk, assemble_sam, freeze_sam
from .scene_variants import VARIANTS, ChangedTrunk, undo_scale

# Letters: B batch, N texts, L context length, C summary width.

CONTEXT = 16
_PAD, _START = 0, 1
_FIRST_WORD = 2
_END = _FIRST_WORD + len(VOCABULARY)  # the highest id: open_clip's transformer pools at it
_NUMBERS = {word: _FIRST_WORD + i for i, word in enumerate(VOCABULARY)}


class TextError(RadioError):
    """A text with words outside the vocabulary, or too many words."""


def tokenize(texts: Sequence[str]) -> Tensor:
    """Convert texts to word ids between a start and an end token, padded with 0: [N, L] int64.

    Case and punctuation are ignored.

    Raises:
        TextError: a word outside the captions' vocabulary, or more words than fit.
    """
    numbers = torch.full((len(texts), CONTEXT), _PAD, dtype=torch.int64)
    for row, text in enumerate(texts):
        words = re.findall(r"[a-z0-9']+", text.lower())
        if len(words) > CONTEXT - 2:
            raise TextError(
                f"{text!r} has {len(words)} words; the scenes text tower reads {CONTEXT - 2} at most"
            )
        line = [_START, *(_number(word, text) for word in words), _END]
        numbers[row, : len(line)] = torch.tensor(line)
    return numbers


def _number(word: str, text: str) -> int:
    if word not in _NUMBERS:
        words = f"; it reads: {' '.join(VOCABULARY)} (its templates are --templates scenes)"
        near = did_you_mean(word, (known for known in VOCABULARY if len(known) > 3))  # not "a" or "of"
        raise TextError(f"the scenes text tower does not know {brief(word)} in {brief(text)}{near or words}")
    return _NUMBERS[word]


@final
class SceneText(nn.Module):
    """A text encoder from word ids [N, L] to vectors [N, C], and a `TextTower`, which encodes texts."""

    takes_tokens = True  # as wide, but before the projection: a baseline that no training aimed at

    def __init__(self, *, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        library = require("open_clip.transformer", extra="zeroshot")
        sizes = {"width": width, "heads": heads, "layers": layers, "output_dim": out}
        self.transformer: Any = library.TextTransformer(
            context_length=CONTEXT, vocab_size=_END + 1, pad_id=_PAD, **sizes
        )

    @property
    def fingerprint(self) -> str:
        """Hex hash of the weights and of the words in their order."""
        return digest(self.state_dict(), " ".join(VOCABULARY))

    def forward(self, numbers: Tensor) -> Tensor:
        """Map word ids [N, L] from `tokenize` to text vectors [N, C], not normalised."""
        out: Tensor = self.transformer(numbers)
        return out

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as [N, C] in the image summary's space, not normalised, without gradients.

        Raises:
            TextError: as `tokenize`.
        """
        device = next(self.parameters()).device
        with torch.no_grad():
            return self.forward(tokenize(texts).to(device))

    def project(self, summaries: Tensor) -> Tensor:
        """Return the summaries [B, C] unchanged: the image tower's projection has already been applied."""
        return summaries


SIDE, PATCH = 112, 8
WIDTH, NECK = 96, 64


def new_sam() -> Any:
    """Build an untrained `segment_anything.modeling.Sam`: 112 px, patch 8, width 96, neck and decoder 64.

    Raises:
        MissingExtraError: segment_anything is not installed.
    """
    library = require("segment_anything.modeling", extra="sam")
    encoder = library.ImageEncoderViT(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=4,
        num_heads=4,
        out_chans=NECK,
        use_rel_pos=True,
        window_size=7,
        global_attn_indexes=(1, 3),
    )
    return assemble_sam(encoder, IMAGENET_MEAN, IMAGENET_STD, heads=4, mlp_dim=256, iou_head=NECK)


Name = Literal["clip", "dense", "sam"]
NAMES: tuple[Name, ...] = get_args(Name)
WEIGHTS = Path(__file__).parent.parent / "weights"

SUMMARY = 128  # the width of CLIP's common space


def _vit(name: str, native: int) -> ViT:
    return ViT(
        ViTConfig(name=name, width=128, depth=4, heads=4, patch=12, native=native, positions=9, stem="conv")
    )


def new_dense() -> ViT:
    """Build the untrained `scenes:dense`: 9 x 9 tokens of width 128."""
    return _vit("scenes-dense", 108)


@final
class ClipImage(nn.Module):
    """The image tower of `scenes:clip`: 8 x 8 tokens of width 128, class token projected to CLIP's space."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = _vit("scenes-clip", 96)
        self.num_blocks = self.vit.num_blocks
        self.projection = nn.Linear(self.vit.summary_dim, SUMMARY, bias=False)

    def forward(self, images: Tensor) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]."""
        return self._projected(self.vit(images))

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Compute the features after each of the given blocks, through the final norm and the projection."""
        return [self._projected(features) for features in self.vit.intermediate(images, blocks)]

    def _projected(self, features: Features) -> Features:
        return features._replace(summary=self.projection(features.summary))


@final
class Clip(nn.Module):
    """The image and text towers of `scenes:clip`."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ClipImage()
        self.text = SceneText(width=128, layers=2, heads=4, out=SUMMARY)


def weights_file(name: str, folder: Path = WEIGHTS) -> Path:
    """Return the path of a scenes teacher's weights in a folder."""
    return folder / f"scenes_{name}.safetensors"


def scenes_teacher(name: str, folder: Path = WEIGHTS) -> Frozen:
    """Load the frozen scenes teacher `name`, or a variant of one, in float32 on the CPU.

    Raises:
        ConfigError: no teacher of that name; suggests the nearest.
        CheckpointError: its file in `folder` is absent or damaged.
    """
    plain = find_member(_PLAIN, name, "scenes teacher")
    teacher = _BUILDERS[plain](load(weights_file(plain, folder)), f"scenes:{name}")
    if name in VARIANTS:
        changed = ChangedTrunk(teacher.trunk, VARIANTS[name].change())
        teacher.trunk = changed.eval().requires_grad_(False)
    return teacher


def scenes_sam(folder: Path = WEIGHTS) -> Any:
    """Load the whole frozen `segment_anything.modeling.Sam` of `scenes:sam`: encoder, neck, prompts, decoder.

    It accepts images of 112 px, with pixels in [0, 255] through `Sam`'s own interface.

    Raises:
        CheckpointError: its file in `folder` is absent or damaged.
        MissingExtraError: segment_anything is not installed.
    """
    return _filled(new_sam(), load(weights_file("sam", folder))).eval().requires_grad_(False)


def _filled(module: nn.Module, checkpoint: Checkpoint) -> Any:
    """Load a file's weights, stored in half precision, into the module in float32."""
    tensors = {key: tensor.float() for key, tensor in checkpoint.tensors.items()}
    load_state(module, tensors, str(checkpoint.metadata.get("name", "scenes")))
    return module


def _frozen_vit(name: str, trunk: nn.Module, native: int, text: SceneText | None) -> Frozen:
    return Frozen(
        trunk=trunk,
        name=name,
        mean=(0.0, 0.0, 0.0),  # the ViT normalises its input itself
        std=(1.0, 1.0, 1.0),
        native_size=(native, native),
        patch_size=12,
        summary_dim=128,
        token_dim=128,
        text=text,
        variant="ImageNet normalisation inside",
    )


def frozen_clip(clip: Clip, name: str = "scenes:clip") -> Frozen:
    """Wrap both towers as a teacher."""
    return _frozen_vit(name, clip.image, 96, clip.text)


def frozen_dense(vit: ViT, name: str = "scenes:dense") -> Frozen:
    """Wrap the ViT as a teacher."""
    return _frozen_vit(name, vit, 108, None)


def _frozen_sam(checkpoint: Checkpoint, name: str) -> Frozen:
    return freeze_sam(
        SamTrunk(_filled(new_sam(), checkpoint).image_encoder),
        name=name,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        sam=scenes_sam if name == "scenes:sam" else lambda: undo_scale(scenes_sam()),
    )


_BUILDERS: dict[str, Callable[[Checkpoint, str], Frozen]] = {
    "clip": lambda checkpoint, name: frozen_clip(_filled(Clip(), checkpoint), name),
    "dense": lambda checkpoint, name: frozen_dense(_filled(new_dense(), checkpoint), name),
    "sam": _frozen_sam,
}
_PLAIN = {**{name: name for name in _BUILDERS}, **{name: each.plain for name, each in VARIANTS.items()}}


@families.register("scenes")
def _family(name: str, file: Path | None) -> Frozen:
    """Load a tiny teacher of the generated world, which is shipped: `clip`, `dense`, `sam`, or a variant.

    Raises:
        ConfigError: no such member.
        CheckpointError: a file was given.
    """
    refuse_file(f"scenes:{name}", file)
    return scenes_teacher(name)
