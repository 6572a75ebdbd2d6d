"""SAM's masks: images and prompts into its frame, masks out of it, and their overlaps with the ground truth.

Masks are compared as bits, eight rows per byte: counting and erosion then work on an eighth of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from radio.errors import require
from radio.teachers.sam import SamHead, decode

# Letters: H W stored image, h w decoder's mask, S side of the frame, P prompts, K clicks, N masks,
# R bytes per column = ceil(H / 8).

_BOUNDARY = 0.02  # of the diagonal (B. Cheng et al. 2021)
_CACHED = 2**20  # embedding values in one batch on a CPU
_APART = 1e6  # pixels between two instances' planes, so that they do not affect each other


class Frame(NamedTuple):
    """The position of a stored image in SAM's square frame, as `SamPredictor` computes it."""

    stored: tuple[int, int]  # (H, W)
    inside: tuple[int, int]  # (height, width) within the frame
    side: int  # S

    def points(self, points: Tensor) -> Tensor:
        """Map points [..., 2] as x y from the stored image into the frame; a box is two points."""
        scale = torch.tensor(
            [self.inside[1] / self.stored[1], self.inside[0] / self.stored[0]], dtype=torch.float64
        )
        return (points.double() * scale).float()

    def masks(self, logits: Tensor) -> Tensor:
        """Resize decoder logits [P, h, w] to the stored size: [P, H, W] float32."""
        whole = F.interpolate(logits[:, None], (self.side, self.side), mode="bilinear", align_corners=False)[
            ..., : self.inside[0], : self.inside[1]
        ]
        return F.interpolate(whole, self.stored, mode="bilinear", align_corners=False)[:, 0]


def make_frame(height: int, width: int, side: int) -> Frame:
    """Build the frame of a stored image of (height, width)."""
    return Frame((height, width), fitted_size(height, width, side), side)


def fitted_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Compute (height, width) of an image resized to a longer side of `side`: rounded, at least 1 each."""
    scale = side / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_and_pad(image: Tensor, side: int, colour: tuple[float, ...]) -> Tensor:
    """Place an image in the top left of a square: uint8 [3, H, W] -> float [3, side, side] in [0, 1].

    It is resized by PIL, bilinear, in integer levels; the rest of the square has the given colour (SAM pads
    with zeros after normalisation, i.e. with its mean colour).
    """
    size = fitted_size(image.shape[1], image.shape[2], side)
    pil_image = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    resized = np.array(pil_image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    square = torch.tensor(colour).view(3, 1, 1).expand(3, side, side).clone()
    square[:, : size[0], : size[1]] = torch.from_numpy(resized).permute(2, 0, 1).float() / 255
    return square


class Prompts(NamedTuple):
    """The prompts of objects, in the frame: boxes [P, 4], or points [P, K, 2] with labels [P, K]."""

    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None

    def add_click(self, points: Tensor, labels: Tensor) -> Prompts:
        """Append a click to each object: points [P, 2] in the frame, labels [P]."""
        points, labels = points[:, None], labels[:, None]
        if self.points is not None and self.labels is not None:
            points, labels = torch.cat((self.points, points), 1), torch.cat((self.labels, labels), 1)
        return Prompts(points=points, labels=labels)


class Predictions(NamedTuple):
    """The best mask of each prompt, as output by the decoder."""

    logits: Tensor  # [P, h, w]
    quality: Tensor  # [P], predicted IoU


def default_prompt_batch(head: SamHead, device: torch.device) -> int:
    """Choose the number of prompts per decoder batch: each has a copy of the embedding."""
    if device.type != "cpu":
        return 64
    width: int = head.mask_decoder.transformer_dim
    return max(1, _CACHED // (width * head.grid[0] * head.grid[1]))


def predict_masks(
    head: SamHead, embeddings: Tensor, image_index: Tensor, prompts: Prompts, prompt_batch: int
) -> Predictions:
    """Select the mask with the highest predicted IoU of each prompt's three, `prompt_batch` at a time.

    Args:
        embeddings: of B images, [B, C, h, w].
        image_index: of each prompt: [P].
    """
    logits, quality = [], []
    for start in range(0, len(image_index), prompt_batch):
        part = slice(start, start + prompt_batch)
        boxes, points, labels = (None if value is None else value[part] for value in prompts)
        decoded = decode(head, embeddings, image_index[part], boxes=boxes, points=points, labels=labels)
        highest, best = decoded.quality.max(dim=1)
        logits.append(decoded.logits[torch.arange(len(best), device=best.device), best])
        quality.append(highest)
    return Predictions(torch.cat(logits), torch.cat(quality))


def next_clicks(truth: Tensor, predictions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the next click on each of N objects: points [N, 2] as x y, labels [N], 1 on the object, else 0.

    The click is placed in the larger error, the missed pixels or the surplus pixels (the missed ones if both
    are equal), at the point farthest from the region's edge, the first of equally far ones in reading order.
    An object without an error is clicked in its centre. Without predictions the whole object is missed.

    Args:
        truth: bool [N, H, W].
        predictions: bool [N, H, W], or None before the first click.
    """
    missed = truth if predictions is None else truth & ~predictions
    surplus = torch.zeros_like(truth) if predictions is None else predictions & ~truth
    more = torch.count_nonzero(missed.flatten(1), dim=1) >= torch.count_nonzero(surplus.flatten(1), dim=1)
    region = torch.where(more[:, None, None], missed, surplus)
    nothing = ~region.flatten(1).any(dim=1)
    region[nothing] = truth[nothing]
    # Distances to the nearest outside pixel, in one call for all: the image's border is outside too.
    morphology: Any = require("scipy.ndimage", extra="sam")
    padded = np.pad(region.cpu().numpy(), ((0, 0), (1, 1), (1, 1)))
    depths = morphology.distance_transform_edt(padded, sampling=(_APART, 1.0, 1.0))[:, 1:-1, 1:-1]
    deepest = torch.from_numpy(depths.astype(np.float32).reshape(len(depths), -1).argmax(axis=1))
    width = truth.shape[2]
    return torch.stack((deepest % width, deepest // width), dim=1).double(), more.cpu().long()


def pack(masks: Tensor) -> Tensor:
    """Pack masks, bool [N, H, W], as uint8 [N, R, W]; bit k of byte i is row 8 * i + k; padded with 0."""
    rows = masks.view(torch.uint8)
    if masks.shape[1] % 8:
        rows = F.pad(rows, [0, 0, 0, -masks.shape[1] % 8])
    planes = rows.unflatten(1, (-1, 8))
    packed: Tensor = planes[:, :, 0].clone()
    for bit in range(1, 8):
        packed |= planes[:, :, bit] << bit
    return packed


def count(bits: Tensor) -> Tensor:
    """Count the set bits: [N, R, W] -> [N] float64; summed in pairs, fours, bytes, then words."""
    flat = bits.flatten(1)
    words = F.pad(flat, [0, -flat.shape[1] % 8]).view(torch.int64)
    words = words - (words >> 1).bitwise_and_(0x5555555555555555)
    fours = (words >> 2).bitwise_and_(0x3333333333333333)
    words.bitwise_and_(0x3333333333333333).add_(fours)
    words.add_(words >> 4).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return words.mul_(0x0101010101010101).bitwise_right_shift_(56).sum(dim=1).double()


def overlap(one: Tensor, other: Tensor, bias: float = 0.0) -> Tensor:
    """Compute intersection / (union + bias) of bit masks, [N, R, W] each: [N] float64; 0 for two empty."""
    both = count(one & other)
    either = count(one) + count(other) - both
    return both / (either + bias).clamp(min=1e-9)


def boundaries(bits: Tensor, size: tuple[int, int]) -> Tensor:
    """Select mask pixels at most 2 % of the diagonal from the mask's edge: bits [N, R, W] -> [N, R, W].

    As in Boundary IoU: the mask minus the mask eroded by 3 x 3 once for each pixel of that distance; pixels
    beyond the image of `size` = (H, W) are outside every mask.
    """
    return bits & ~erode(bits, max(round(_BOUNDARY * math.hypot(*size)), 1))


def fill(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Fill boxes [N, 4] as x0 y0 x1 y1: bits [N, R, W] of the pixels whose centres lie inside."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    down, across = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    return pack(down[:, :, None]) & across[:, None, :].to(torch.uint8) * 255


def erode(bits: Tensor, reach: int) -> Tensor:
    """Erode masks `reach` times by 3 x 3: [N, R, W] -> [N, R, W]; the outside counts as unset.

    A pixel remains where the square of side 2 * reach + 1 around it is full; this is computed by doubling, so
    the cost grows with the logarithm of the reach.
    """
    eroded = torch.zeros_like(bits)
    side = 2 * reach + 1
    if side <= bits.shape[2]:
        across = _run(bits, side, lambda full, step: full[..., :-step] & full[..., step:])
        down = _run(across, side, lambda full, step: full & _rows_up(full, step))
        eroded[..., reach:-reach] = _rows_down(down, reach)
    return eroded


def _run(bits: Tensor, length: int, join: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Mark where runs of `length` set bits begin; `join` intersects bits with those some steps later."""
    full, reached = bits, 1
    while reached < length:
        step = min(reached, length - reached)
        full, reached = join(full, step), reached + step
    return full


def _rows_up(bits: Tensor, rows: int) -> Tensor:
    """Shift rows up: row i + `rows` moves to row i."""
    whole, rest = divmod(rows, 8)
    moved = F.pad(bits, [0, 0, 0, whole + 1])[:, whole:]
    return moved[:, :-1] if not rest else (moved[:, :-1] >> rest) | (moved[:, 1:] << (8 - rest))


def _rows_down(bits: Tensor, rows: int) -> Tensor:
    """Shift rows down: row i - `rows` moves to row i."""
    whole, rest = divmod(rows, 8)
    moved = F.pad(bits, [0, 0, whole + 1, 0])[:, : bits.shape[1] + 1]
    return moved[:, 1:] if not rest else (moved[:, 1:] << rest) | (moved[:, :-1] >> (8 - rest))
