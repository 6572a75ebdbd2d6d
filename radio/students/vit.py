"""The ViT students: any image size with CPE, optionally windowed as in ViTDet (paper §4, appendix C)."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..checkpoint import digest
from ..config import check, to_plain
from ..errors import ConfigError, SizeError
from ..nn.vit import (
    NORM_EPS,
    Block,
    ConvStem,
    CroppedPositions,
    LinearStem,
    Normalise,
    draw_crops,
    recomputed,
)
from ..ops import check_blocks, check_window, from_windows, nearest_multiple, to_windows
from ..types import Features
from . import Schedule, ViTDetOptions, ViTOptions, students

# Letters: B batch, T tokens, D width, K class tokens, H W grid.


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentShape:
    """Settings common to the configs of the ViT and E-RADIO families."""

    name: str
    native: int = 224  # native image side in pixels
    window: int | None = None  # side of an attention window in tokens
    activation_checkpointing: bool = False  # does not change the output


class ShapedStudent(nn.Module):
    """A student that its `config` describes completely, except for the weights."""

    config: StudentShape
    fixed_size = False
    num_blocks = 0
    intermediate: Callable[..., list[Features]] | None = None
    patch_size: int  # pixels along one side of a token
    summary_dim: int
    summary_tokens: int
    token_dim: int

    @property
    def name(self) -> str:
        """Name of the architecture."""
        return self.config.name

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of everything in the config that changes the output."""
        shape = to_plain(replace(self.config, activation_checkpointing=False))
        shape.pop("cpe", None)  # concerns training alone
        return digest(self.state_dict(), json.dumps(shape, sort_keys=True))

    @property
    def native_size(self) -> tuple[int, int]:
        """Native (height, width) in pixels."""
        return self.nearest_size(self.config.native, self.config.native)

    @property
    def window(self) -> int | None:
        """Side of the attention windows in tokens."""
        return self.config.window

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the nearest accepted (height, width) in pixels."""
        raise NotImplementedError

    def with_window(self, side: int | None) -> Self:
        """Return this student with another window side, sharing the weights.

        Args:
            side: in tokens; None: global attention in a ViT, chosen by the input's size in an E-RADIO.

        Raises:
            SizeError: a side below 1.
        """
        if side is not None and side < 1:
            raise SizeError(f"a window of {side} tokens cannot be; use 1 or more, or none for the default")
        twin = copy.copy(self)
        twin.config = replace(self.config, window=side)
        return twin

    def apply_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Apply a block; in training recompute its activations in the backward pass if the config says so."""
        if self.config.activation_checkpointing and self.training:
            return recomputed(block, *inputs)
        out: Tensor = block(*inputs)
        return out


def global_blocks(depth: int, schedule: Schedule = "quarters") -> tuple[int, ...]:
    """Compute the indices of the global blocks; the others are windowed, and the last is always global.

    `quarters`, or 4: one at the end of every quarter of the depth (ViTDet: 7, 15, 23, 31 of 32).
    Another number: as many parts. If they do not divide the depth, each has the quotient rounded down, and
    the remaining blocks end in an additional global one (5, 11, 17, 23, 26 of 27; AM-RADIO's rule).
    `runs-of-5`: one after every five windowed blocks (5, 11, 17, 23, 29, 31 of 32).

    Raises:
        ConfigError: parts of a single block, all of them global, or no parts.
    """
    parts = 4 if schedule == "quarters" else schedule
    period = 6 if isinstance(parts, str) else depth // max(parts, 1)
    if period < 2 or (isinstance(parts, int) and parts < 1):
        raise ConfigError(
            f"a depth of {depth} does not have {parts} parts of two or more blocks, some windowed; "
            f"take a schedule of 1 to {max(depth // 2, 1)} global blocks, or runs-of-5"
        )
    return tuple(sorted({*range(period - 1, depth, period), depth - 1}))


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig(StudentShape):
    """The shape of one ViT; a window of None is global attention everywhere."""

    width: int
    depth: int
    heads: int
    patch: int
    positions: int  # side of the position table
    cpe: bool = True  # crop the table in training; does not change the output in evaluation
    mlp_ratio: float = 4.0
    class_tokens: int = 1  # 0 = average pooling
    registers: int = 0
    stem: Literal["linear", "conv"] = "linear"
    layer_scale: float | None = None
    schedule: Schedule = "quarters"


class ViT(ShapedStudent):
    """A vision transformer for any image whose sides are multiples of the patch (times the window)."""

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config, self.patch_size, self.token_dim = config, config.patch, config.width
        self.num_blocks = config.depth
        self.summary_tokens = max(config.class_tokens, 1)  # concatenated, or one when pooling
        self.summary_dim = config.width * self.summary_tokens
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

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the nearest (height, width) that patch and window divide."""
        step = self.config.patch * (self.config.window or 1)
        return nearest_multiple(height, step), nearest_multiple(width, step)

    def sample_crops(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Draw the position crops of one training forward: [B, 5]; None without CPE."""
        return draw_crops(batch, generator) if self.config.cpe else None

    def forward(self, images: Tensor, crops: Tensor | None = None) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]; `crops` come from `sample_crops`, None in evaluation.

        Raises:
            SizeError: a size that patch (and window) do not divide; names the nearest that they do.
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
        check_blocks(blocks, self.num_blocks, self.name)
        grid, side = self._grid(images), self.config.window
        patches = self.stem(self.normalise(images))
        patches = patches + self.positions(grid, crops)
        prefix = self.prefix.expand(images.shape[0], -1, -1)
        if side is not None:
            patches = to_windows(patches, grid, side)
        everywhere = self._global_blocks()
        p, outputs = prefix.shape[1], {}
        for index, block in enumerate(self.blocks):
            if index > max(blocks):
                break
            if side is None or index in everywhere:
                joined = self.apply_block(block, torch.cat((prefix, patches), dim=1))
                prefix, patches = joined[:, :p], joined[:, p:]
            else:
                b, t, d = patches.shape
                windows = patches.reshape(b * (grid[0] // side) * (grid[1] // side), side * side, d)
                patches = self.apply_block(block, windows).reshape(b, t, d)
            if index in blocks:
                outputs[index] = self._features(prefix, patches, grid)
        return [outputs[index] for index in blocks]

    def _features(self, prefix: Tensor, patches: Tensor, grid: tuple[int, int]) -> Features:
        if self.config.window is not None:
            patches = from_windows(patches, grid, self.config.window)
        tokens = self.norm(patches)
        k = self.config.class_tokens
        summary = self.norm(prefix[:, :k]).flatten(1) if k else tokens.mean(dim=1)
        return Features(summary, tokens, grid)

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


def _build(config: ViTConfig, options: ViTOptions) -> ViT:
    options = check(options, config.name)
    given = {key: value for key, value in to_plain(options).items() if value is not None}
    whole = replace(config, **given)
    if not whole.cpe:  # in a larger table, most positions would never be trained: resizing skips them
        whole = replace(whole, positions=whole.native // whole.patch)
    if whole.window is not None:
        global_blocks(whole.depth, whole.schedule)  # raises early for an impossible schedule
    return ViT(whole)


def _build_windowed(config: ViTConfig, options: ViTDetOptions) -> ViT:
    return _build(config, options)


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
    # Not the paper's: the small ViT, SigLIP's shape-optimised ViT, and timm's giant.
    (replace(_B14, name="vit-s14", width=384, heads=6), "vitdet-s14", 8),
    (replace(_B14, name="vit-s16", width=384, heads=6, patch=16, positions=128), "vitdet-s16", 7),
    (
        replace(_B14, name="vit-so400m14", width=1152, depth=27, heads=16, mlp_ratio=4304 / 1152),
        "vitdet-so400m14",
        8,
    ),
    # Patch 16, as the models after RADIOv1 have: 2048 px are 128 x 128 positions.
    (replace(_B14, name="vit-l16", width=1024, depth=24, heads=16, patch=16, positions=128), "vitdet-l16", 7),
    (replace(_B14, name="vit-h16", width=1280, depth=32, heads=16, patch=16, positions=128), "vitdet-h16", 7),
    (
        replace(
            _B14,
            name="vit-so400m16",
            width=1152,
            depth=27,
            heads=16,
            mlp_ratio=4304 / 1152,
            patch=16,
            positions=128,
        ),
        "vitdet-so400m16",
        7,
    ),
    (replace(_B14, name="vit-g14", width=1408, depth=40, heads=16, mlp_ratio=48 / 11), "vitdet-g14", 8),
    (_TINY, "vitdet-tiny12", 4),
    (replace(_TINY, name="vit-tiny16", patch=16, native=160, positions=20), "vitdet-tiny16", 5),
)

for _config, _twin, _side in _FAMILY:
    students.add(_config.name, functools.partial(_build, _config))
    students.add(_twin, functools.partial(_build_windowed, replace(_config, name=_twin, window=_side)))
