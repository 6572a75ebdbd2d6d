"""The ViT students: any image size with CPE, optionally windowed as in ViTDet (paper §4, appendix C)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, SizeError
from ..nn.block import NORM_EPS, Block
from ..nn.normalise import Normalise
from ..nn.patch_embed import ConvStem, LinearStem
from ..nn.positions import CroppedPositions, draw_crops
from ..types import Features
from ..windows import check_window, from_windows, nearest_multiple, to_windows
from . import StudentOptions, students
from .shape import Shape, Shaped
from .windowed import Schedule, global_blocks

# Letters: B batch, T tokens, D width, K class tokens, H W grid.


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig(Shape):
    """The shape of one ViT; a window of None is global attention everywhere."""

    width: int
    depth: int
    heads: int
    patch: int
    positions: int  # side of the position table
    mlp_ratio: float = 4.0
    class_tokens: int = 1  # 0 = average pooling
    registers: int = 0
    stem: Literal["linear", "conv"] = "linear"
    layer_scale: float | None = None
    schedule: Schedule = "quarters"


class ViT(Shaped):
    """A vision transformer for any image whose sides are multiples of the patch (times the window)."""

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise()
        stem = LinearStem if config.stem == "linear" else ConvStem
        self.stem = stem(config.width, config.patch)
        self.positions = CroppedPositions(config.width, config.positions)
        prefix = torch.empty(1, config.class_tokens + config.registers, config.width)
        # If empty it is a buffer, as FSDP cannot shard an empty parameter; checkpoints hold it either way.
        self.prefix: Tensor = nn.Parameter(prefix) if len(prefix[0]) else nn.Buffer(prefix)
        hidden = round(config.width * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, hidden, config.layer_scale) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        nn.init.trunc_normal_(self.prefix, std=0.02)
        self.blocks.apply(_initialise)

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a token."""
        return self.config.patch

    @property
    def summary_dim(self) -> int:
        """Width C: the concatenated class tokens, or the token width when pooling."""
        return self.config.width * max(self.config.class_tokens, 1)

    @property
    def token_dim(self) -> int:
        """Width D of the tokens."""
        return self.config.width

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the nearest (height, width) that patch and window divide."""
        step = self.config.patch * (self.config.window or 1)
        return nearest_multiple(height, step), nearest_multiple(width, step)

    def with_window(self, side: int | None) -> Self:
        """Return this ViT with another window side (None: global attention), sharing the weights.

        Raises:
            SizeError: a side below 1.
        """
        if side is not None and side < 1:
            raise SizeError(
                f"a window of {side} tokens cannot be; use 1 or more, or none for global attention"
            )
        twin = copy.copy(self)
        twin.config = replace(self.config, window=side)
        return twin

    def sample_crops(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw the position crops of one training forward: [B, 5]."""
        return draw_crops(batch, generator)

    def forward(self, images: Tensor, crops: Tensor | None = None) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1].

        Args:
            images: pixels; both sides multiples of the patch (times the window).
            crops: position crops from `sample_crops`; None in evaluation.

        Raises:
            SizeError: a size that does not fit; names the nearest that does.
        """
        return self.intermediate(images, [self.config.depth - 1], crops)[0]

    def intermediate(
        self, images: Tensor, blocks: Sequence[int], crops: Tensor | None = None
    ) -> list[Features]:
        """Compute the features after each of the given blocks (counted from 0), all through the final norm.

        Raises:
            SizeError: a size that does not fit.
            ConfigError: a block that does not exist.
        """
        depth = self.config.depth
        for index in blocks:
            if not 0 <= index < depth:
                raise ConfigError(f"block {index} is not one of the {depth} of {self.name}; count from 0")
        grid = self._grid(images)
        patches = self.stem(self.normalise(images))
        patches = patches + self.positions(grid, crops)
        prefix = self.prefix.expand(images.shape[0], -1, -1)
        return self._encode(prefix, patches, grid, blocks)

    def _encode(
        self, prefix: Tensor, patches: Tensor, grid: tuple[int, int], wanted: Sequence[int]
    ) -> list[Features]:
        side = self.config.window
        if side is not None:
            patches = to_windows(patches, grid, side)
        everywhere = self._global_blocks()
        p, found = prefix.shape[1], {}
        for index, block in enumerate(self.blocks):
            if index > max(wanted):
                break
            if side is None or index in everywhere:
                joined = self._call(block, torch.cat((prefix, patches), dim=1))
                prefix, patches = joined[:, :p], joined[:, p:]
            else:
                windows = self._call(block, patches.reshape(-1, side * side, patches.shape[-1]))
                patches = windows.reshape(patches.shape)
            if index in wanted:
                found[index] = self._features(prefix, patches, grid)
        return [found[index] for index in wanted]

    def _features(self, prefix: Tensor, patches: Tensor, grid: tuple[int, int]) -> Features:
        if self.config.window is not None:
            patches = from_windows(patches, grid, self.config.window)
        tokens = self.norm(patches)
        k = self.config.class_tokens
        summary = self.norm(prefix[:, :k]).flatten(1) if k else tokens.mean(dim=1)
        return Features(summary, tokens, grid)

    def _call(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.config.activation_checkpointing and self.training:
            out: Tensor = checkpoint(block, x, use_reentrant=False)
            return out
        plain: Tensor = block(x)
        return plain

    def _global_blocks(self) -> tuple[int, ...]:
        return () if self.config.window is None else global_blocks(self.config.depth, self.config.schedule)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        patch, window = self.config.patch, self.config.window
        if height % patch or width % patch:
            h, w = self.nearest_size(height, width)
            raise SizeError(
                f"{self.name} cannot take {height}x{width} px: its patch of {patch} does not divide that; "
                f"the nearest size is {h}x{w}"
            )
        grid = height // patch, width // patch
        if window is not None:
            check_window(grid, window)
        return grid


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _build(config: ViTConfig, options: StudentOptions) -> ViT:
    """Build a ViT of this shape with a recipe's options.

    Raises:
        ConfigError: an option that it does not have, or a count out of range.
    """
    chosen = {
        key: value
        for key in ("class_tokens", "registers", "stem", "window", "schedule")
        if (value := getattr(options, key)) is not None
    }
    foreign = [name for name in ("upsample", "image_size") if getattr(options, name) is not None]
    if foreign:
        raise ConfigError(f"{config.name} has no {foreign[0].replace('_', '-')}; that is for timm students")
    if config.window is None and ({"window", "schedule"} & chosen.keys()):
        raise ConfigError(f"{config.name} has no windows; use vitdet-{config.name.removeprefix('vit-')}")
    for key, least in (("class_tokens", 0), ("registers", 0), ("window", 1)):
        if chosen.get(key, least) < least:
            raise ConfigError(f"{config.name}: {key} is {chosen[key]}, and {least} is the least it can be")
    whole = replace(config, activation_checkpointing=options.activation_checkpointing, **chosen)
    if whole.window is not None:
        global_blocks(whole.depth, whole.schedule)  # raises early for an impossible schedule
    return ViT(whole)


# The paper's table 6 and §4: patch 14 has 75 x 75 positions (1050 px), patch 16 has 128 x 128 (2048 px). Each
# has a windowed twin; the last column is the twin's window side, which divides the native grid.
_TINY = ViTConfig(
    name="vit-tiny12",
    width=128,
    depth=4,
    heads=4,
    patch=12,
    native=96,
    positions=16,
    stem="conv",
    schedule="runs-of-5",  # a depth of 4 has no quarters: three windowed blocks and a global one
)
_B14 = ViTConfig(name="vit-b14", width=768, depth=12, heads=12, patch=14, native=224, positions=75)
_FAMILY = (
    (replace(_B14, name="vit-b32", patch=32, positions=64), "vitdet-b32", 7),
    (replace(_B14, name="vit-b16", patch=16, positions=128), "vitdet-b16", 7),
    (_B14, "vitdet-b14", 8),
    (replace(_B14, name="vit-l14", width=1024, depth=24, heads=16), "vitdet-l14", 8),
    (replace(_B14, name="vit-h14", width=1280, depth=32, heads=16), "vitdet-h14", 8),
    # Not the paper's: SigLIP's shape-optimised ViT, and timm's giant.
    (
        replace(_B14, name="vit-so400m14", width=1152, depth=27, heads=16, mlp_ratio=4304 / 1152),
        "vitdet-so400m14",
        8,
    ),
    (replace(_B14, name="vit-g14", width=1408, depth=40, heads=16, mlp_ratio=48 / 11), "vitdet-g14", 8),
    (_TINY, "vitdet-tiny12", 4),
    (replace(_TINY, name="vit-tiny16", patch=16, native=160, positions=20), "vitdet-tiny16", 5),
)

for _config, _twin, _side in _FAMILY:
    students.add(_config.name, functools.partial(_build, _config))
    students.add(_twin, functools.partial(_build, replace(_config, name=_twin, window=_side)))
