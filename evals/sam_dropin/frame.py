"""SAM's pixel frame, as `SamPredictor` computes it: maps images and prompts in, masks out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Letters: H W stored image, h w decoder's mask, S side of the frame, P prompts.


def fitted(height: int, width: int, side: int) -> tuple[int, int]:
    """Compute (height, width) of an image resized to a longer side of `side`: rounded, at least 1 each."""
    scale = side / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def place(image: Tensor, side: int, colour: tuple[float, ...]) -> Tensor:
    """Place an image in the top left of a square: uint8 [3, H, W] -> float [3, side, side] in [0, 1].

    It is resized by PIL, bilinear, in integer levels; the rest of the square has the given colour (SAM pads
    with zeros after normalisation, i.e. with its mean colour).
    """
    size = fitted(image.shape[1], image.shape[2], side)
    pil_image = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    resized = np.array(pil_image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    square = torch.tensor(colour).view(3, 1, 1).expand(3, side, side).clone()
    square[:, : size[0], : size[1]] = torch.from_numpy(resized).permute(2, 0, 1).float() / 255
    return square


class Frame(NamedTuple):
    """The position of a stored image in SAM's square."""

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
    return Frame((height, width), fitted(height, width, side), side)
