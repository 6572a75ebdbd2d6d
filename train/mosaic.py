"""Mosaics: several small images in one input of a teacher that takes one large size, such as SAM.

RADIOv2.5 lays 4 x 4 images of 256 px, or 2 x 2 of 432 px, into SAM's 1024 px; the map is cut apart again.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from radio.errors import SizeError
from radio.types import Features, Teacher

# Letters: B images, M mosaics, k tiles along a side, r side of an image, H W grid, D token width.


def tiles_per_side(teacher: Teacher, side: int) -> int:
    """Return k, how many images of a side in pixels stand along one side of the teacher's input.

    Raises:
        SizeError: the side is no multiple of the teacher's patch, or larger than its input.
    """
    whole, patch = min(teacher.native_size), teacher.patch_size
    if side % patch or not patch <= side <= whole:
        raise SizeError(
            f"images of {side} px cannot stand in a mosaic of {whole} px for {teacher.name}, whose patches "
            f"are {patch} px; give a multiple of {patch} up to {whole}"
        )
    return whole // side


def mosaic_features(teacher: Teacher, images: Tensor, shift: tuple[int, int] = (0, 0)) -> Features:
    """Compute a teacher's features of small images, k x k of them in one forward pass.

    Every image has a cell of the mosaic, as large as the teacher's grid allows; what the images do not fill
    is black, and left out of the features. The teacher's attention sees the other tiles: its features are not
    exactly those of one image alone, and change with the shift. Images that fill the input cannot move.

    Args:
        teacher: takes one square size.
        images: [B, 3, r, r] in [0, 1].
        shift: tokens that all images move (down, right), modulo what is free in a cell and at the edge.

    Returns:
        Features of each image on its own grid; the summary is the mean of its tokens, as SAM's is.

    Raises:
        SizeError: as `tiles_per_side`.
    """
    count, _, side, _ = images.shape
    k, patch = tiles_per_side(teacher, side), teacher.patch_size
    whole = min(teacher.native_size) // patch  # in tokens, as all that follows
    tile, cell = side // patch, whole // k
    room, edge = cell - tile, whole - k * cell  # that each image has in its cell, and all cells together
    down, right = (step % (room + edge + 1) for step in shift)
    y, x = min(down, room), min(right, room)  # of an image in its cell; the cells move by the rest
    cells = F.pad(images, [part * patch for part in (x, room - x, y, room - y)])
    missing = -count % (k * k)
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, missing))
    rows = cells.unflatten(0, (-1, k, k)).permute(0, 3, 1, 4, 2, 5)  # [M, 3, k, cell, k, cell]
    mosaics = rows.flatten(4, 5).flatten(2, 3)
    top, left = down - y, right - x
    found = teacher(F.pad(mosaics, [part * patch for part in (left, edge - left, top, edge - top)]))
    maps = found.tokens.unflatten(1, found.grid)  # [M, H, W, D]
    maps = maps[:, top : top + k * cell, left : left + k * cell]
    tiles = maps.unflatten(2, (k, cell)).unflatten(1, (k, cell)).transpose(2, 3).flatten(0, 2)[:count]
    tokens = tiles[:, y : y + tile, x : x + tile].flatten(1, 2)
    return Features(tokens.mean(dim=1), tokens, (tile, tile))
