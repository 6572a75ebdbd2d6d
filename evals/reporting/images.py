"""Images embedded in the page: small, WebP or PNG, up to a total size."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from radio.errors import DataError, shown
from radio.images import decode
from radio.io import read_bytes

from .blocks import Thumbnail
from .records import file_inside

# Letters: H W pixels.

_QUALITY = 78
_MAX_BYTES = 256 << 20


@final
class ImageBudget:
    """Encodes images as long as their bytes stay within the page's budget."""

    def __init__(self, most_bytes: int = 2_000_000) -> None:
        self._left = most_bytes
        self.left_out = 0

    def add(
        self,
        pixels: Tensor | NDArray[np.uint8],
        alt: str,
        *,
        side: int,
        label: str = "",
        good: bool | None = None,
        shown: int | None = None,
        exact: bool = False,
    ) -> Thumbnail | None:
        """Encode an image, uint8 [H, W, 3] or a tensor [3, H, W]; None where it exceeds the budget.

        Args:
            alt: the alternative text.
            side: the longer side in pixels, at most; larger images are reduced.
            label: text beside the image.
            good: whether it shows something right, where that applies.
            shown: the longer side on the page, if it is enlarged there.
            exact: keep every pixel (PNG).
        """
        array = pixels.permute(1, 2, 0).numpy() if isinstance(pixels, Tensor) else pixels
        image = Image.fromarray(np.ascontiguousarray(array))
        longest = max(image.size)
        if longest > side:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        if exact:
            image.save(buffer, format="PNG", optimize=True)
        else:
            image.save(buffer, format="WEBP", quality=_QUALITY, method=4)
        kind = "png" if exact else "webp"
        source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(source) > self._left:
            self.left_out += 1
            return None
        self._left -= len(source)
        scale = 1.0 if shown is None else shown / max(image.size)
        return Thumbnail(
            src=source,
            alt=alt,
            width=round(image.width * scale),
            height=round(image.height * scale),
            label=label,
            good=good,
            crisp=shown is not None and shown > max(image.size),
        )


def read_image(folder: Path, name: str) -> Tensor:
    """Read an image that a report names among its files: uint8 [3, H, W].

    Raises:
        DataError: the file does not exist, lies outside the report's folder, or is no image.
    """
    path = file_inside(folder.resolve(), name)
    if path is None and ".." in name.split("/"):
        raise DataError(f"{shown(name)} is not inside the folder of its report, so it is not shown")
    if path is None:
        raise DataError(f"{shown(name)} is not there any more")
    try:
        return decode(read_bytes(path, limit=_MAX_BYTES))
    except DataError as error:
        raise DataError(f"{shown(name)}: {error}") from error
