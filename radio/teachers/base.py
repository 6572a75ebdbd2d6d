"""The common part of all teachers: read a weights file, normalise, check sizes, and never train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar, cast, final

import torch
from torch import Tensor, nn

from ..checkpoint import digest, load_tensors
from ..errors import CheckpointError, ConfigError, DataError, SizeError, did_you_mean
from ..ops import check_blocks, nearest_multiple
from ..types import AdaptingModel, Adaptor, Features, TextTower

T = TypeVar("T")

_TEXTS_AT_ONCE = 256


def find_member(members: Mapping[str, T], name: str, kind: str) -> T:
    """Return the family's member of that name; `kind` is the word for it in messages.

    Raises:
        ConfigError: there is none; suggests the nearest.
    """
    if name not in members:
        hint = did_you_mean(name, members) or f"; known: {', '.join(members)}"
        raise ConfigError(f"unknown {kind} {name!r}{hint}")
    return members[name]


def read_weights(spec: str, file: Path | None, anchors: Collection[str] = ()) -> dict[str, Tensor]:
    """Read the state dict in a teacher's weights file: floats as float32, trainers' wrappings removed.

    `spec` is the teacher's name with its family, as in `dinov2:vitb14`; `anchors` are weight names of its
    network, by which a prefix is recognised.

    Raises:
        CheckpointError: no file was given, it does not exist, or it is no weights file.
    """
    if file is None:
        raise CheckpointError(f"{spec} needs a weights file; name it as in {spec}@FILE")
    return {
        name: tensor.float() if torch.is_floating_point(tensor) else tensor
        for name, tensor in load_tensors(file, anchors).items()
    }


def encode_batches(texts: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Encode texts in batches, without gradients: [N, E].

    Raises:
        DataError: no texts.
    """
    if not texts:
        raise DataError("no texts to encode; give at least one")
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    with torch.no_grad():
        return torch.cat([encode(list(texts[start : start + _TEXTS_AT_ONCE])) for start in starts])


def refuse_file(spec: str, file: Path | None) -> None:
    """Check that no file was given for a teacher that includes its own weights.

    Raises:
        CheckpointError: one was given.
    """
    if file is not None:
        raise CheckpointError(f"{spec} brings its own weights; leave out @{file}")


# Letters: B batch, C summary width, T tokens, D token width, h w pixels, N texts, L text length.


@final
class ClipText(nn.Module):
    """A text encoder (token ids [N, L] -> [N, C]) and its tokenizer, as the text tower of a teacher.

    The tokenizer is made at the first text; `tokenizer_name` represents it in the fingerprint.
    """

    takes_tokens = False

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
            CheckpointError: there is no tokenizer.
        """
        device = next(self.encoder.parameters()).device
        return encode_batches(texts, lambda batch: self.encoder(self._tokenizer(batch).to(device)))

    def project(self, summaries: Tensor) -> Tensor:
        """Return the summaries [B, C] unchanged: they are in the texts' space already."""
        return summaries


@final
class Frozen(AdaptingModel, nn.Module):
    """A trunk behind the `Teacher` protocol: [B, 3, h, w] RGB in [0, 1] -> `Features`, without gradients.

    The trunk maps normalised images to `Features`; one with `num_blocks` also has `intermediate(images,
    blocks)`, which returns those after each block, one with attention windows `window` and `with_window`.
    Both sides in pixels must be multiples of `patch_size` (times the window), or the native size where
    `fixed_size` says so. `variant` describes what else determines the features (a resampling rule, a choice
    of layer), so that the fingerprint covers it; in it, `identity` replaces a name that changes with the
    place of the files. `text` is the text tower that shares the summary's space, `sam` loads the SAM that the
    trunk belongs to, `adaptors` lead into the spaces of its own teachers.
    """

    def __init__(
        self,
        *,
        trunk: nn.Module,
        name: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        native_size: tuple[int, int],
        patch_size: int,
        fixed_size: bool = False,
        summary_dim: int,
        token_dim: int,
        summary_tokens: int = 0,
        text: TextTower | None = None,
        sam: Callable[[], Any] | None = None,
        adaptors: nn.ModuleDict | None = None,
        metadata: Mapping[str, Any] | None = None,
        variant: str = "",
        identity: str = "",
        weights_file: Path | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.num_blocks: int = getattr(trunk, "num_blocks", 0)
        self.adaptors = cast("Mapping[str, Adaptor]", nn.ModuleDict() if adaptors is None else adaptors)
        self.metadata = dict(metadata or {})
        self._load_sam = sam
        self.text: TextTower | None = text  # usually a module too: it moves along with this one
        self.weights_file = weights_file
        self.name = name
        self.native_size = self._native = native_size
        self.patch_size = patch_size
        self.fixed_size = fixed_size
        self.summary_dim = summary_dim
        self.token_dim = token_dim
        self.summary_tokens = summary_tokens
        self._settings = f"{identity or name} mean={mean} std={std} {variant}"
        self._fingerprints: dict[torch.dtype, str] = {}
        like = next(trunk.parameters(), torch.empty(0))
        for key, value in (("mean", mean), ("std", std)):
            buffer = torch.tensor(value, device=like.device, dtype=like.dtype).view(3, 1, 1)
            self.register_buffer(key, buffer, persistent=False)
        assert self.nearest_size(*native_size) == native_size, (
            f"{name}: its native size is none that it takes"
        )
        self.requires_grad_(False)
        self.train(False)

    @property
    def sam(self) -> Any:
        """The `segment_anything.modeling.Sam`, loaded at each call; None if the trunk is no SAM's."""
        return None if self._load_sam is None else self._load_sam()

    @property
    def fingerprint(self) -> str:
        """Hex hash of name, settings and all weights in their current dtype; cached per dtype."""
        dtype = self.get_buffer("mean").dtype
        if dtype not in self._fingerprints:
            heads = self.get_submodule("adaptors").state_dict()
            weights = {**self.trunk.state_dict(), **{f"adaptors.{name}": heads[name] for name in heads}}
            window = "" if self.window is None else f" window={self.window}"
            self._fingerprints[dtype] = digest(weights, f"{self._settings}{window}")
        return self._fingerprints[dtype]

    @property
    def window(self) -> int | None:
        """Side in tokens of the trunk's attention windows."""
        side: int | None = getattr(self.trunk, "window", None)
        return side

    @property
    def with_window(self) -> Callable[[int | None], Self] | None:
        """Method that returns this encoder with windows of another side; None for a trunk without windows."""
        return self._with_window if hasattr(self.trunk, "with_window") else None

    def _with_window(self, side: int | None) -> Self:
        trunk: Any = self.trunk
        twin = copy.copy(self)
        twin._modules = {**self._modules, "trunk": trunk.with_window(side)}
        twin._fingerprints = {}
        twin.native_size = twin.nearest_size(*self._native)
        return twin

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the accepted (height, width) in pixels nearest to the requested one."""
        if self.fixed_size:
            return self.native_size
        step = self.patch_size * (self.window or 1)
        return nearest_multiple(height, step), nearest_multiple(width, step)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a parent's `train()` must not enable dropout or batch norm."""
        return super().train(False)

    def forward(self, images: Tensor) -> Features:
        """Compute the features of [B, 3, h, w] RGB in [0, 1], in the trunk's dtype, without gradients.

        Raises:
            SizeError: no such batch, or a size that the encoder does not accept; names the nearest
                accepted one.
        """
        with torch.no_grad():
            features: Features = self.trunk(self._normalise(images))
        return self._checked(features, len(images))

    @property
    def intermediate(self) -> Callable[[Tensor, Sequence[int]], list[Features]] | None:
        """Method that computes the features after given blocks (see `Encoder`); None without blocks."""
        return self._intermediate if self.num_blocks else None

    def _intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        check_blocks(blocks, self.num_blocks, self.name)
        trunk: Any = self.trunk
        with torch.no_grad():
            outputs: list[Features] = trunk.intermediate(self._normalise(images), blocks)
        return [self._checked(features, len(images)) for features in outputs]

    def _normalise(self, images: Tensor) -> Tensor:
        """Check the images' shape and normalise them, in the weights' dtype."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise SizeError(f"{self.name}: wanted images [B, 3, h, w], got {list(images.shape)}")
        height, width = images.shape[-2:]
        fitting = self.nearest_size(height, width)
        if fitting != (height, width):
            raise SizeError(
                f"{self.name} cannot take {height}x{width} pixels (height x width); the nearest size "
                f"that it can is {fitting[0]}x{fitting[1]}: resize the images"
            )
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images.to(mean.dtype) - mean) / std

    def _checked(self, features: Features, batch: int) -> Features:
        assert features.summary.shape == (batch, self.summary_dim)
        assert features.tokens.shape == (batch, features.grid[0] * features.grid[1], self.token_dim)
        return features
