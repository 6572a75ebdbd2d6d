"""Pictures: bytes to pixels, and the two views everyone uses (evaluation and random crop).

One convention, here and everywhere: RGB, channels first, uint8 as stored and float32 in [0, 1] once
resized. Every resize is bicubic (a = -0.5), antialiased, in float32, clamped to [0, 1]: what
torchvision.transforms.v2 computes on float pictures, and PIL on uint8 ones up to its rounding.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision  # noqa: F401 (registers the JPEG operator)
from PIL import Image
from torch import Tensor

from .errors import DataError, SizeError
from .io import write_bytes
from .resample import resize_images

# Letters: H W stored height and width, h w the ones asked for.

EVALUATION_RATIO = 256 / 224

# What PIL's decoders are known to raise on damaged or foreign bytes.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# torchvision's Python wrapper warns at every call that it will go; the operator under it does not. Where
# it has gone, PIL gives the same pixels at half the speed.
_decode_jpeg: Callable[..., Tensor] | None
try:
    _decode_jpeg = torch.ops.image.decode_jpeg
except AttributeError:
    _decode_jpeg = None
_AS_STORED, _KEEP_ORIENTATION = 0, False


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode(data: bytes) -> Tensor:
    """The picture in an image file's bytes: uint8 [3, H, W] RGB.

    Ordinary colour JPEGs go through torchvision's decoder (twice as fast), everything else through PIL.
    Grey is repeated, CMYK and palettes are converted, 16-bit keeps its upper byte, alpha is dropped
    (the hidden colour shows, as with PIL's `convert("RGB")`). An EXIF orientation is not applied, as in
    torchvision and timm.

    Raises:
        DataError: not a picture, a truncated or damaged one, or one with floating-point pixels.
    """
    if data[:3] == b"\xff\xd8\xff" and _decode_jpeg is not None:
        # bytearray: torch warns about read-only buffers.
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            image = _decode_jpeg(buffer, _AS_STORED, _KEEP_ORIENTATION)
        except RuntimeError as error:
            reason = _first_line(error).split(", ")[-1]
            raise DataError(f"a damaged or truncated JPEG ({reason})") from error
        if image.shape[0] == 3:
            return image.contiguous()
    return torch.from_numpy(_decode_with_pil(data))


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(path, buffer.getbuffer())


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The whole picture at (height, width): uint8 [3, H, W] -> float [3, h, w] in [0, 1]."""
    pixels = image.unsqueeze(0).to(torch.float32).div_(255.0)
    return resize_images(pixels, size, "bicubic").squeeze(0)


def cover(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect that covers `box`; the free side is rounded down.

    Raises:
        SizeError: a side below one pixel.
    """
    if min(height, width, *box) < 1:
        raise SizeError(
            f"a {height}x{width} picture cannot cover {box[0]}x{box[1]}; every side needs a pixel"
        )
    if box[0] * width >= box[1] * height:
        return box[0], max(int(box[0] * width / height), box[1])
    return max(int(box[1] * height / width), box[0]), box[1]


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (height, width) of [..., H, W]; an odd margin is halved as torchvision does (to even).

    Raises:
        SizeError: the picture is smaller than the crop.
    """
    height, width = image.shape[-2:]
    if size[0] > height or size[1] > width:
        raise SizeError(f"cannot crop {size[0]}x{size[1]} out of {height}x{width}; resize the picture first")
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return image[..., top : top + size[0], left : left + size[1]]


def evaluation_view(image: Tensor, size: tuple[int, int], ratio: float = EVALUATION_RATIO) -> Tensor:
    """The evaluators' view of a picture: uint8 [3, H, W] -> float [3, h, w] in [0, 1].

    The picture is resized to cover round(ratio * size) and its middle is cut out: with 224 and 256/224
    the usual "short side to 256, centre crop 224". Smaller pictures are enlarged.

    Raises:
        SizeError: a ratio below 1, or a side below one pixel.
    """
    if ratio < 1:
        raise SizeError(
            f"a resize ratio of {ratio} leaves less than the crop; give 1 or more (256/224 is usual)"
        )
    box = (round(ratio * size[0]), round(ratio * size[1]))
    return center_crop(resize(image, cover(image.shape[-2], image.shape[-1], box)), size)


def sample_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Box:
    """A random crop of an H x W picture, by the rule (and in the draws) of torchvision's RandomResizedCrop.

    The area is uniform in `scale` (a share of the picture), the aspect w/h log-uniform in `ratio`; ten
    tries, then the largest middle crop of an allowed aspect.

    Raises:
        SizeError: an empty picture or range.
    """
    if min(height, width) < 1 or not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
        raise SizeError(
            f"cannot crop a {height}x{width} picture with scale {scale} and ratio {ratio}; "
            f"give each range as (low, high), above zero"
        )
    for _ in range(10):
        area = height * width * _uniform(scale[0], scale[1], generator)
        aspect = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1]), generator))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return Box(top, left, h, w)
    return _largest_crop(height, width, ratio)


def crop_and_resize(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """A box of a picture at (height, width): uint8 [3, H, W] -> float [3, h, w] in [0, 1]."""
    return resize(image[:, box.top : box.top + box.height, box.left : box.left + box.width], size)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    # A float32 draw, so that crops equal torchvision's.
    return float(torch.empty(1).uniform_(low, high, generator=generator))


def _largest_crop(height: int, width: int, ratio: tuple[float, float]) -> Box:
    h, w = height, width
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _decode_with_pil(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        with Image.open(io.BytesIO(data)) as file:
            pixels = _rgb(file)
    except DataError:
        raise
    except _DECODER_ERRORS as error:
        raise DataError(f"not a picture, or a damaged one ({_first_line(error)})") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _rgb(file: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    if file.mode == "F":
        raise DataError("floating-point pixels have no agreed range; save the picture with 8 or 16 bits")
    if file.mode.startswith("I"):
        # PIL clips 16-bit grey at 255 when it converts; the upper byte is the picture.
        upper = (np.asarray(file).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(upper[..., None], 3, axis=2)
    if "transparency" in file.info:
        return np.array(file.convert("RGBA"))[..., :3]
    return np.array(file.convert("RGB"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
