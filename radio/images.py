"""Decode images, and compute the two usual views (evaluation and random crop).

One convention throughout: RGB, channels first, uint8 as stored. Every resize is bicubic (a = -0.5) and
antialiased. Evaluators resize in float32, clamped to [0, 1]: what torchvision.transforms.v2 computes on float
images, and PIL on uint8 ones up to its rounding. Training crops are resized in 8 bits, several times as fast.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torchvision  # noqa: F401 (registers the JPEG operator)
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import DataError, RadioError, SizeError
from .io import write_bytes
from .ops import resize_images

# Letters: H W stored height and width, h w the requested ones.

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".ppm", ".pgm"),
    *(".tif", ".tiff", ".gif"),
)
"""Endings, in lower case, of the file names that count as images."""

# By content, whatever a file's name. PIL has 30 more formats, and one of them (EPS) starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "PPM", "TIFF", "GIF", "JPEG2000")

MAX_PIXELS = 178_956_970
"""Limit of an image: PIL's own, enforced for every format from the header, before decoding."""
MAX_IMAGE_BYTES = 1 << 30
"""Limit of an image file: the size of `MAX_PIXELS` with 16 bits and three channels."""

# What decoders raise on damaged or foreign bytes, for example AVIF's RuntimeError or NotImplementedError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
)
_ADDRESS = re.compile(r"<([\w.]+) object at 0x[0-9a-fA-F]+>")

# PIL warns between half the limit and the limit, and of damaged EXIF, which does not affect the pixels.
# Images are decoded in threads, so warnings cannot be caught around each one.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# torchvision's Python wrapper warns of its removal at every call; the operator under it does not. Where it is
# absent, PIL decodes the same pixels at half the speed.
_decode_jpeg: Callable[..., Tensor] | None
try:
    _decode_jpeg = torch.ops.image.decode_jpeg
except AttributeError:
    _decode_jpeg = None
_AS_STORED, _KEEP_ORIENTATION = 0, False
_ORIENTATION = 0x0112
_SEQUENTIAL = (0xC0, 0xC1)  # Huffman-coded
_PROGRESSIVE, _MAX_SCANS = (0xC2, 0xC6, 0xCA, 0xCE), 1000  # ten are usual; each passes over all the pixels
_JPEG, _SCAN, _END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a scan: neither a stuffed byte nor a restart
_MAX_STEPS, _MAX_SHIFT = 16, 1 / 8  # output pixels, and pixels of the half resolution; see `_decode_half`
_PNG, _PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode(data: bytes) -> Tensor:
    """Decode an image file's bytes: uint8 [3, H, W] RGB.

    Ordinary colour JPEGs are decoded by torchvision (twice as fast), everything else by PIL. Grey is
    repeated, CMYK and palettes are converted, 16-bit keeps its upper byte, alpha is dropped (the hidden
    colour shows, as with PIL's `convert("RGB")`). An EXIF orientation is not applied, as in torchvision and
    timm.

    Raises:
        DataError: not an image, a truncated or damaged one, one with floating-point pixels, or one of more
            than `MAX_PIXELS`.
    """
    return _decode(data).contiguous()


def decode_crop(data: bytes, sample: Callable[[int, int], Box], size: tuple[int, int]) -> Tensor:
    """Decode a crop of an image file's bytes and resize it to (height, width): uint8 [3, h, w].

    A crop at least twice as high and twice as wide as `size` is cut out of half the resolution, where the
    file is a colour JPEG of one scan: libjpeg then computes a quarter of the pixels, down to the crop's last
    row. All other crops and files are decoded in full.

    Args:
        data: the file's bytes.
        sample: draws the crop of an image of a height and width; called once.
        size: of the resized crop.

    Raises:
        DataError: as `decode`, for the same files.
    """
    frame = _jpeg_frame(data) if data.startswith(_JPEG) else _NO_FRAME
    if frame.height * frame.width == 0:
        image = _decode(data)
        return crop_and_resize(image, sample(image.shape[1], image.shape[2]), size)
    box = sample(frame.height, frame.width)
    if box.height >= 2 * size[0] and box.width >= 2 * size[1] and _has_whole_scan(data, frame):
        with suppress(DataError):  # PIL may refuse what torchvision decodes
            return _decode_half(data, frame, box, size)
    return crop_and_resize(_decode(data), box, size)


def _decode(data: bytes) -> Tensor:
    """Decode as `decode` does, channels last in memory if that is how the decoder leaves them."""
    if data.startswith(_JPEG) and _decode_jpeg is not None:
        _check_jpeg(data)
        # bytearray: torch warns about read-only buffers.
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            image = _decode_jpeg(buffer, _AS_STORED, _KEEP_ORIENTATION)
        except RuntimeError as error:
            reason = _first_line(error).split(", ")[-1]
            raise DataError(f"a damaged or truncated JPEG ({reason})") from error
        if image.shape[0] == 3:
            return image
    return torch.from_numpy(_decode_with_pil(data))


@contextmanager
def open_image(data: bytes, formats: tuple[str, ...] = _FORMATS) -> Iterator[Image.Image]:
    """Open an image file's bytes with PIL as one of the supported formats; the pixels are loaded later.

    Every reader of foreign images uses it: whatever decoding raises, inside the block too, becomes a
    DataError.

    Args:
        data: the file's bytes; text in a PNG is skipped, as PIL refuses long texts.
        formats: PIL's names of the formats.

    Raises:
        DataError: none of the formats, a damaged image, or one of more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(_without_text(data)), formats=formats) as file:
            _check_pixels(file.height, file.width)
            yield file
    except RadioError:
        raise
    except UnidentifiedImageError as error:
        kinds = ", ".join(formats)
        raise DataError(f"not an image, or a damaged one (opens as none of {kinds})") from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        _check_pixels(1, int(pixels[0]) if pixels else MAX_PIXELS + 1)
        raise DataError(f"not an image, or a damaged one ({_first_line(error)})") from error
    except _DECODER_ERRORS as error:
        raise DataError(f"not an image, or a damaged one ({_first_line(error)})") from error


def orientation(data: bytes) -> int:
    """Read the EXIF orientation of an image file's bytes (never applied); 1 is upright or absent."""
    try:
        with open_image(data) as file:
            found = file.getexif().get(_ORIENTATION, 1)
    except DataError:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def write_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getbuffer())


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize the whole image to (height, width): uint8 [3, H, W] -> float [3, h, w] in [0, 1]."""
    pixels = image.unsqueeze(0).to(torch.float32).div_(255.0)
    return resize_images(pixels, size, "bicubic").squeeze(0)


def cover(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """Compute the smallest (height, width) of the same aspect that covers `box`; round the free side down.

    Raises:
        SizeError: a side below one pixel.
    """
    if min(height, width, *box) < 1:
        raise SizeError(f"a {height}x{width} image cannot cover {box[0]}x{box[1]}; every side needs a pixel")
    if box[0] * width >= box[1] * height:
        return box[0], max(int(box[0] * width / height), box[1])
    return max(int(box[1] * height / width), box[0]), box[1]


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop the centre (height, width) of [..., H, W]; an odd margin is halved as in torchvision (to even).

    Raises:
        SizeError: the image is smaller than the crop.
    """
    height, width = image.shape[-2:]
    if size[0] > height or size[1] > width:
        raise SizeError(f"cannot crop {size[0]}x{size[1]} out of {height}x{width}; resize the image first")
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return image[..., top : top + size[0], left : left + size[1]]


def evaluation_view(image: Tensor, size: tuple[int, int], ratio: float = 256 / 224) -> Tensor:
    """Compute the evaluators' view of an image: uint8 [3, H, W] -> float [3, h, w] in [0, 1].

    The image is resized to cover round(ratio * size) and centre-cropped: with 224 and 256/224 the usual
    "short side to 256, centre crop 224". Smaller images are enlarged.

    Raises:
        SizeError: a ratio below 1, or a side below one pixel.
        DataError: the image is so long and narrow that it would exceed `MAX_PIXELS` when resized.
    """
    if ratio < 1:
        raise SizeError(
            f"a resize ratio of {ratio} leaves less than the crop; give 1 or more (256/224 is usual)"
        )
    box = (round(ratio * size[0]), round(ratio * size[1]))
    covering = cover(image.shape[-2], image.shape[-1], box)
    if covering[0] * covering[1] > MAX_PIXELS:
        raise DataError(
            f"{image.shape[-2]}x{image.shape[-1]} (height x width) would be {covering[0]}x{covering[1]} when "
            f"resized to cover {box[0]}x{box[1]}; it is too long and narrow, crop it"
        )
    return center_crop(resize(image, covering), size)


def sample_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Box:
    """Draw a random crop of an H x W image, by the rule and draws of torchvision's RandomResizedCrop.

    The area is uniform in `scale` (a share of the image), the aspect w/h log-uniform in `ratio`; after ten
    failed tries, the largest centre crop of an allowed aspect.

    Raises:
        SizeError: an empty image or range.
    """
    if min(height, width) < 1 or not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
        raise SizeError(
            f"cannot crop a {height}x{width} image with scale {scale} and ratio {ratio}; "
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
    """Crop a box and resize it to (height, width) in 8 bits: uint8 [3, H, W] -> uint8 [3, h, w]."""
    crop = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    return resize_images(crop, size).squeeze(0)


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


def _decode_half(data: bytes, frame: _Frame, box: Box, size: tuple[int, int]) -> Tensor:
    """Cut a box of a JPEG out of half its resolution, resized to (height, width): uint8 [3, h, w].

    Torch resizes three times as fast as PIL, but only from a whole pixel on. An odd edge lies between two
    pixels of the half resolution; then the resize starts a few output pixels earlier, where a pixel begins.
    """
    top, left, height, width = (side / 2 for side in box)
    step_y, step_x = height / size[0], width / size[1]
    rows, columns = _whole_start(top, step_y), _whole_start(left, step_x)
    # With a lower height in its header the decoder stops early. A row's colours depend on a few rows below.
    last = min(box.top + box.height + 16, frame.height)
    shorter = data[: frame.at + 5] + struct.pack(">H", last) + data[frame.at + 7 :]
    with open_image(shorter, ("JPEG",)) as file:
        file.draft("RGB", (file.width // 2, file.height // 2))
        if rows is None or columns is None:  # about one crop in ten
            edges = (left, top, left + width, top + height)
            resized = file.resize((size[1], size[0]), Image.Resampling.BICUBIC, edges)
            return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        (y, before_y), (x, before_x) = rows, columns
        h, w = before_y + size[0], before_x + size[1]
        # The kernel extends by two steps.
        bottom, right = math.ceil(y + (h + 2) * step_y), math.ceil(x + (w + 2) * step_x)
        cropped = np.array(file.crop((x, y, min(right, file.width), min(bottom, file.height))))
    pixels = torch.from_numpy(cropped).permute(2, 0, 1).unsqueeze(0)
    # The operator under F.interpolate, which takes either a size or a scale, not both.
    output = torch.ops.aten._upsample_bicubic2d_aa(pixels, [h, w], False, 1 / step_y, 1 / step_x)
    return cast(Tensor, output)[0, :, before_y:, before_x:]


def _whole_start(start: float, step: float) -> tuple[int, int] | None:
    """Find a whole pixel that lies a number of steps before `start`: (pixel, steps); None if none is near."""
    places = [start - steps * step for steps in range(min(_MAX_STEPS, int(start / step) + 1))]
    steps = min(range(len(places)), key=lambda steps: abs(places[steps] - round(places[steps])))
    nearest = round(places[steps])
    return (nearest, steps) if abs(places[steps] - nearest) <= _MAX_SHIFT else None


def _decode_with_pil(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with open_image(data) as file:
        pixels = _rgb(file)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _rgb(file: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    if file.mode == "F":
        raise DataError("floating-point pixels have no agreed range; save the image with 8 or 16 bits")
    if file.mode.startswith("I"):
        # PIL clips 16-bit grey at 255 when it converts; the upper byte is the image.
        upper = (np.asarray(file).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(upper[..., None], 3, axis=2)
    if "transparency" in file.info:
        return np.array(file.convert("RGBA"))[..., :3]
    return np.array(file.convert("RGB"))


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        millions = round(height * width / 1e6)
        raise DataError(
            f"{millions:,} million pixels, the limit is {MAX_PIXELS / 1e6:.0f} million; make it smaller"
        )


def _check_jpeg(data: bytes) -> None:
    frame = _jpeg_frame(data)
    _check_pixels(frame.height, frame.width)
    scans = data.count(_SCAN) if frame.marker in _PROGRESSIVE else 1
    if scans > _MAX_SCANS:
        raise DataError(f"a JPEG of {scans:,} scans, the limit is {_MAX_SCANS:,}; save it anew")


class _Frame(NamedTuple):
    """The header of a JPEG's frame; zeros if it has none."""

    marker: int
    height: int
    width: int
    at: int  # position of the marker


_NO_FRAME = _Frame(0, 0, 0, 0)


def _has_whole_scan(data: bytes, frame: _Frame) -> bool:
    """Check that a JPEG has three components in one scan, whose data end where the image does.

    Such data never run out, however damaged: a decoder refuses the file for its header or not at all, and may
    stop before the last row.
    """
    if frame.marker not in _SEQUENTIAL or frame.height * frame.width > MAX_PIXELS:
        return False
    scan = data.find(_SCAN, frame.at)
    if scan < 0 or data[frame.at + 9 : frame.at + 10] != b"\3" or data[scan + 4 : scan + 5] != b"\3":
        return False
    end = _MARKER.search(data, scan + 2)
    return end is not None and end[0] == _END


def _jpeg_frame(data: bytes) -> _Frame:
    """Find a JPEG's first frame, as libjpeg does."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 8:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return _Frame(marker, height, width, at)
        if marker == 0xFF:
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # markers without a length field
            at += 2
        else:
            at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    return _NO_FRAME


def _without_text(data: bytes) -> bytes:
    """Remove a PNG's texts and colour profile: PIL rejects the whole image if they are long."""
    if not data.startswith(_PNG):
        return data
    kept, start, at = [], 0, len(_PNG)
    while at + 8 <= len(data):
        end = at + 12 + int(struct.unpack_from(">I", data, at)[0])
        if data[at + 4 : at + 8] in _PNG_TEXTS:
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return _ADDRESS.sub(r"\1", line)  # without the address, which differs between runs
