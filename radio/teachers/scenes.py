"""The three tiny teachers included in the package, trained on the generated scenes.

- `scenes:clip`: a ViT (96 px, patch 12) and a text transformer; summary = class token in their common space.
- `scenes:dense`: a ViT (108 px, patch 12) with supervision of its class token and every patch. It
  replaces a self-supervised encoder, but is not one.
- `scenes:sam`: segment_anything's image encoder (112 px, patch 8); tokens before the neck, summary = mean.

Each file's metadata records how it was made; tools/scene_teachers makes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, final, get_args

from torch import Tensor, nn

from ..checkpoint import Checkpoint, load, load_state
from ..errors import ConfigError, did_you_mean
from ..nn.normalise import IMAGENET_MEAN, IMAGENET_STD
from ..students.vit import ViT, ViTConfig
from ..types import Features
from . import families, outlines
from .frozen import Frozen
from .sam import SamTrunk, freeze_sam
from .scenes_sam import new_sam
from .scenes_text import SceneText
from .weights_file import refuse_file

Name = Literal["clip", "dense", "sam"]
NAMES: tuple[Name, ...] = get_args(Name)
WEIGHTS = Path(__file__).parent.parent / "weights"

SUMMARY = 128  # the width of CLIP's common space
_NOTHING = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the ViT normalises its input itself


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
        self.projection = nn.Linear(self.vit.summary_dim, SUMMARY, bias=False)

    def forward(self, images: Tensor) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]."""
        features: Features = self.vit(images)
        return features._replace(summary=self.projection(features.summary))


@final
class Clip(nn.Module):
    """The image and text towers of `scenes:clip`."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ClipImage()
        self.text = SceneText(width=128, layers=2, heads=4, out=SUMMARY)


def weights_file(name: Name, folder: Path = WEIGHTS) -> Path:
    """Return the path of a scenes teacher's weights in a folder."""
    return folder / f"scenes_{name}.safetensors"


def scenes_teacher(name: str, folder: Path = WEIGHTS) -> Frozen:
    """Load the frozen scenes teacher `name`, in float32 on the CPU.

    Raises:
        ConfigError: no teacher of that name; suggests the nearest.
        CheckpointError: its file in `folder` is absent or damaged.
    """
    for known in NAMES:
        if name == known:
            return _BUILDERS[known](load(weights_file(known, folder)))
    hint = did_you_mean(name, NAMES) or f"; known: {', '.join(NAMES)}"
    raise ConfigError(f"unknown scenes teacher {name!r}{hint}")


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
    mean, std = _NOTHING
    return Frozen(
        trunk=trunk,
        name=name,
        mean=mean,
        std=std,
        native_size=(native, native),
        patch_size=12,
        summary_dim=128,
        token_dim=128,
        text=text,
        variant="ImageNet normalisation inside",
    )


def frozen_clip(clip: Clip) -> Frozen:
    """Wrap both towers as a teacher."""
    return _frozen_vit("scenes:clip", clip.image, 96, clip.text)


def frozen_dense(vit: ViT) -> Frozen:
    """Wrap the ViT as a teacher."""
    return _frozen_vit("scenes:dense", vit, 108, None)


def frozen_sam(sam: Any) -> Frozen:
    """Wrap a `Sam`'s image encoder without its neck as a teacher."""
    return freeze_sam(SamTrunk(sam.image_encoder), name="scenes:sam", mean=IMAGENET_MEAN, std=IMAGENET_STD)


_BUILDERS: dict[Name, Callable[[Checkpoint], Frozen]] = {
    "clip": lambda checkpoint: frozen_clip(_filled(Clip(), checkpoint)),
    "dense": lambda checkpoint: frozen_dense(_filled(new_dense(), checkpoint)),
    "sam": lambda checkpoint: frozen_sam(_filled(new_sam(), checkpoint)),
}


@families.register("scenes")
def _family(name: str, file: Path | None) -> Frozen:
    refuse_file(f"scenes:{name}", file)
    return scenes_teacher(name)


@outlines.register("scenes")
def outline(name: str) -> Frozen:
    """Load the scenes teacher `name` and move it to the meta device.

    Raises:
        ConfigError: no teacher of that name; suggests the nearest.
    """
    return scenes_teacher(name).to("meta")
