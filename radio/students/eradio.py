"""The E-RADIO students: convolutions, then windowed attention at two resolutions (paper §5.1, appendix B)."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import check, to_plain
from ..errors import SizeError
from ..nn.hybrid import (
    C2f,
    ChannelAffine,
    ConvNorm,
    Downsample,
    MultiResolutionBlock,
    Neck,
    NeckKind,
    StridedStem,
    WindowBlock,
    map_of,
    windows_of,
)
from ..nn.vit import Normalise
from ..ops import check_window, choose_side, nearest_multiple
from ..types import Features
from . import ERadioOptions, students
from .vit import ShapedStudent, StudentShape

# Letters: B batch, T tokens, D width, H W grid.

LEAST_WINDOW = 4
"""In tokens; smaller sides are used only if requested."""

MOST_WINDOW = 16
"""In tokens; larger sides are chosen only if none from 4 to 16 divides the map."""

_BRANCH = 0.3  # initial scale of half-resolution branches; at 1 every one doubles the variance


@dataclass(frozen=True, kw_only=True, slots=True)
class ERadioConfig(StudentShape):
    """The shape of one E-RADIO: four stages of widths d, 2d, 4d, 8d, each at half the resolution before."""

    width: int  # d
    depths: tuple[int, int, int, int]
    strides: tuple[int, int] = (2, 2)  # of the stem's two convolutions
    inner: int = 64  # channels between them
    heads: tuple[int, int] = (8, 16)  # in stages 3 and 4
    ratios: tuple[int, ...] = (2, 1)  # ratios of the blocks in one layer of stage 3
    mix: float = 1.0  # factor on x + f(x) of a block at ratio 2; the released model uses 0.5
    neck: NeckKind | None = "lateral"  # None = no up-sampling


class ERadio(ShapedStudent):
    """A hybrid of C2f stages and windowed transformer stages, with batch norms, and maps in channels-last.

    A forward uses one window side: it divides stage 4's map, which has the size of stage 3's half-resolution
    maps, and therefore also the other maps of stage 3, twice as large. It is 4 or more, and chosen by the
    input's size (224 px: 7, 256: 8, 384: 12, 512: 16) unless `with_window` sets it.
    """

    config: ERadioConfig

    def __init__(self, config: ERadioConfig) -> None:
        super().__init__()
        self.config = config
        d, (one, two, three, four) = config.width, config.depths
        self.cell = 8 * config.strides[0] * config.strides[1]  # pixels along a token of stage 4
        self.patch_size = self.cell if config.neck is None else self.cell // 2  # a neck doubles the map
        self.summary_dim, self.token_dim = 8 * d, (4 if config.neck == "stage-3" else 8) * d
        self.summary_tokens = int(config.neck is None)
        self.normalise = Normalise()
        self.stem = StridedStem(d, config.inner, config.strides)
        self.stage1, self.down1 = C2f(d, one), Downsample(d)
        self.stage2, self.down2 = C2f(2 * d, two), Downsample(2 * d)
        self.stage3 = nn.ModuleList(
            MultiResolutionBlock(4 * d, config.heads[0], ratio, config.mix) for ratio in config.ratios * three
        )
        self.down3 = Downsample(4 * d)
        self.stage4 = nn.ModuleList(WindowBlock(8 * d, config.heads[1]) for _ in range(four))
        self.norm: nn.Module = nn.BatchNorm2d(8 * d)
        self.neck = None if config.neck is None else Neck(4 * d, 8 * d, config.neck)
        self.apply(_initialise)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the (height, width) nearest to the requested one that a window divides."""
        side = self.config.window
        longest = max(height, width) // self.cell + 1
        sides = range(LEAST_WINDOW, max(LEAST_WINDOW, longest) + 1) if side is None else (side,)
        sizes = [
            (nearest_multiple(height, self.cell * s), nearest_multiple(width, self.cell * s)) for s in sides
        ]
        return min(sizes, key=lambda size: (size[0] - height) ** 2 + (size[1] - width) ** 2)

    def sample_crops(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Return None: a training forward draws nothing at random."""
        return None

    def fuse(self) -> Self:
        """Return a copy for inference with every batch norm folded into its convolution or an affine map."""
        twin = copy.deepcopy(self).eval()
        for module in twin.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        if isinstance(twin.norm, _BatchNorm):
            twin.norm = ChannelAffine(twin.norm)
        return twin

    def forward(self, images: Tensor, crops: Tensor | None = None) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]; `crops` are ignored.

        Raises:
            SizeError: a size that no window divides; names the nearest that one does.
        """
        side = self._window(images)
        # Only the input: convolutions follow its layout, and FSDP does not support channels-last weights.
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        x = self.down1(self.apply_block(self.stage1, self.stem(x)))
        x = self.down2(self.apply_block(self.stage2, x))
        for block in self.stage3:
            x = self.apply_block(block, x, side)
        low = self.down3(x)
        windows = windows_of(low, side)
        for block in self.stage4:
            windows = self.apply_block(block, windows, side)
        last = self.norm(map_of(windows, (low.shape[2], low.shape[3]), side))
        plane = last if self.neck is None else self.neck(x, last)
        tokens = plane.permute(0, 2, 3, 1).flatten(1, 2)
        return Features(last.mean(dim=(2, 3)), tokens, (plane.shape[2], plane.shape[3]))

    def _window(self, images: Tensor) -> int:
        height, width = images.shape[-2:]
        cell, side = self.cell, self.config.window
        grid = height // cell, width // cell
        if height % cell == 0 and width % cell == 0:
            if side is not None:
                check_window(grid, side)
                return side
            chosen = choose_side(grid, LEAST_WINDOW, MOST_WINDOW)
            if chosen is not None:
                return chosen
        h, w = self.nearest_size(height, width)
        wanted = f"{LEAST_WINDOW} or more" if side is None else f"{side}"
        raise SizeError(
            f"{self.name} cannot take {height}x{width} px: a token of its last stage is {cell}x{cell} "
            f"px, and a window of {wanted} of them must divide both sides; the nearest size is {h}x{w}"
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        _keep_variance(module)
    elif isinstance(module, Neck):
        module.init_identity()
    elif isinstance(module, MultiResolutionBlock) and isinstance(module.up, nn.ConvTranspose2d):
        module.up.weight.data *= _BRANCH
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _keep_variance(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Initialise a convolution to preserve the variance of its input, whatever the kernels' overlap."""
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    if isinstance(conv, nn.ConvTranspose2d):
        taps //= conv.stride[0] * conv.stride[1]
    nn.init.trunc_normal_(conv.weight, std=(conv.in_channels * max(taps, 1)) ** -0.5)


def _build(config: ERadioConfig, options: ERadioOptions) -> ERadio:
    return ERadio(replace(config, **to_plain(check(options, config.name))))


# Widths and depths chosen to match the parameter counts of the paper's table 6.
_FAMILY = (
    ERadioConfig(name="e-radio-xt", width=64, depths=(1, 3, 4, 5)),
    ERadioConfig(name="e-radio-t", width=80, depths=(1, 3, 4, 5)),
    ERadioConfig(name="e-radio-s", width=96, depths=(3, 3, 5, 5)),
    ERadioConfig(name="e-radio-b", width=128, depths=(3, 3, 5, 5)),
    ERadioConfig(name="e-radio-l", width=192, depths=(3, 3, 5, 5)),
    # For images of 96 px: a stem of stride 3 gives tokens of 12 px (24 without up-sampling), and windows of
    # 4 at 96 px and 7 at 168 px. A stride of 2 learns more, in twice the time.
    ERadioConfig(
        name="e-radio-tiny",
        width=24,
        depths=(1, 1, 2, 3),
        native=96,
        strides=(3, 1),
        inner=24,
        heads=(3, 6),  # of 32 channels each, as in xt: narrower ones learn slower
    ),
)

for _config in _FAMILY:
    students.add(_config.name, functools.partial(_build, _config))
    _plain = replace(_config, name=f"{_config.name}-noup", neck=None)
    students.add(_plain.name, functools.partial(_build, _plain))
