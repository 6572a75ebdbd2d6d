"""The head, its loss and its learning rate, and the measures of depth maps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Letters: B batch, D token width, H W grid, h w pixels.

MIN_DEPTH, MAX_DEPTH = 1e-3, 10.0
"""Range of the bins in metres; only true depths inside it are scored."""

MEASURES = ("rmse", "abs_rel", "d1", "d2", "d3", "log10")

_NUM_BINS = 256
_UPSAMPLING = 4
_FLOOR = 0.1  # added to the bins' scores before they are normalised
_LOG_EPS = 1e-3  # metres, inside the loss's logarithms
_MEAN_SHARE = 0.15  # of the squared mean log ratio in the loss
_START, _END = 1 / 25, 1 / 2500  # of the peak learning rate: torch's and mmcv's one-cycle (the end: mmcv's)


class DepthHead(nn.Module):
    """Batch norm, a 1x1 convolution to 256 bins of equal width, and the bins' weighted mean.

    The bins' weights are the scores' positive parts plus 0.1, normalised to a sum of 1 ("linear", as against
    a softmax; AdaBins, arXiv 2011.14141, has the bins). Scores are upsampled by 4 before that. It is the same
    as upsampling the tokens, up to the statistics of the batch norm, and takes less memory.
    """

    bins: Tensor

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, _NUM_BINS, 1)
        bound = 1 / math.sqrt(width)  # torch's own initial range
        for parameter in self.conv.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.register_buffer("bins", torch.linspace(MIN_DEPTH, MAX_DEPTH, _NUM_BINS), persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Compute depths in metres from tokens: [B, D, H, W] -> [B, 4H, 4W]."""
        # With the bins innermost, which CPUs resize and sum more than twice as fast.
        scores = self.conv(self.bn(maps)).contiguous(memory_format=torch.channels_last)
        scores = F.interpolate(scores, scale_factor=_UPSAMPLING, mode="bilinear").permute(0, 2, 3, 1)
        weights = scores.relu() + _FLOOR
        depths: Tensor = (weights @ self.bins) / weights.sum(dim=-1)
        return depths


def resize_depth(depths: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize depth maps [B, H, W] to [B, h, w]."""
    return F.interpolate(depths.unsqueeze(1), size, mode="bilinear").squeeze(1)


def sig_loss(depths: Tensor, truth: Tensor, *, mean_only: bool = False) -> Tensor:
    """Compute the scale-invariant logarithmic loss of a batch, sqrt(Var[g] + 0.15 E[g]^2), a scalar.

    g is the log ratio of predicted and true depth over the pixels of the batch whose depth is known. That is
    Eigen's loss (arXiv 1406.2283) with lambda 0.85, under the root as in BTS and AdaBins.

    Args:
        depths: [B, h, w] in metres.
        truth: [B, h, w] in metres; 0 = unknown.
        mean_only: sqrt(0.15 E[g]^2), for the first steps.
    """
    known = truth > 0
    count = known.sum()
    ratio = torch.where(known, (depths + _LOG_EPS).log() - (truth + _LOG_EPS).log(), 0.0)
    mean = ratio.sum() / count.clamp(min=1)
    squared = _MEAN_SHARE * mean.square()
    if not mean_only:
        squared = squared + torch.where(known, ratio - mean, 0.0).square().sum() / (count - 1).clamp(min=1)
    return squared.clamp(min=1e-12).sqrt()  # a root has no slope at 0


def one_cycle(step: int, warmup: int, steps: int) -> float:
    """Compute the factor on the peak learning rate: a cosine up to 1 at step warmup - 1, and one down."""
    if step < warmup:
        begin, end, share = _START, 1.0, step / (warmup - 1) if warmup > 1 else 1.0
    else:
        begin, end, share = 1.0, _END, (step - warmup + 1) / (steps - warmup)
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * share))


def measure(depths: Tensor, truth: Tensor) -> Tensor:
    """Compute the `MEASURES` of each depth map over the pixels whose true depth is inside the range.

    `rmse` is in metres, `d1` to `d3` are the shares of pixels with a ratio below 1.25, 1.25^2 and 1.25^3.

    Args:
        depths: [B, h, w] in metres, clamped to the range here.
        truth: [B, h, w] in metres.

    Returns:
        [B, 6] float64; NaN where a map has no such pixel.
    """
    scored = (truth > MIN_DEPTH) & (truth < MAX_DEPTH)
    truth = torch.where(scored, truth, 1.0).double()
    depths = torch.where(scored, depths.clamp(MIN_DEPTH, MAX_DEPTH), 1.0).double()  # an error of 0
    ratio = torch.maximum(depths / truth, truth / depths)
    error = depths - truth
    sums = [error.square(), error.abs() / truth, *(scored & (ratio < 1.25**n) for n in (1, 2, 3))]
    sums.append((depths.log10() - truth.log10()).abs())
    count = scored.sum(dim=(1, 2))
    means = torch.stack([each.double().sum(dim=(1, 2)) / count for each in sums], dim=1)
    means[:, 0].sqrt_()
    return means
