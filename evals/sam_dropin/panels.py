"""Panels for visual inspection: an instance's prompt, ground truth and predicted mask, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from radio.images import write_png
from radio.progress import ProgressFactory

from .annotations import CocoImage
from .coco import Instances
from .decoding import masks_by_image
from .scoring import Record
from .work import Work

# Letters: H W pixels.

_SIDE = 320  # least pixels of an image's longer side: small ones are enlarged by an integer factor
_STRIP = 18  # pixels for the caption under each image
_TRUTH, _DRAWN, _PROMPT = (60, 200, 90), (240, 90, 60), (255, 220, 0)


def choose(records: Sequence[Record], count: int) -> list[tuple[str, Record]]:
    """Choose the best, the median and the worst `count` records, each with its label and none twice.

    Ties are ordered by annotation id.
    """
    order = sorted(records, key=lambda record: (-record.iou, record.annotation_id))
    middle = max((len(order) - count) // 2, 0)
    parts = (("best", order[:count]), ("median", order[middle : middle + count]), ("worst", order[-count:]))
    found: dict[int, tuple[str, Record]] = {}
    for word, part in parts:
        for record in part:
            found.setdefault(record.annotation_id, (word, record))
    return list(found.values())


def write_panels(
    work: Work, data: Instances, records: Sequence[Record], out: Path, watch: ProgressFactory
) -> tuple[str, ...]:
    """Draw `save_masks` panels of each kind into the folder `out`; return their file names.

    Each shows the image with the prompt's box, the ground truth, the predicted mask, and its IoU.
    """
    chosen = choose(records, work.settings.save_masks)
    by_number = {image.number: image for image in data.images}
    names = []
    with watch("panels", len(chosen)) as advance:
        for place, (word, record) in enumerate(chosen):
            image = by_number[record.image_id]
            name = f"{place:02d}-{word}-{record.image_id}-{record.annotation_id}.png"
            write_png(Image.fromarray(_panel(work, data, image, record)), out / name)
            names.append(name)
            advance(1)
    return tuple(names)


def _panel(work: Work, data: Instances, image: CocoImage, record: Record) -> NDArray[np.uint8]:
    wanted = next(i for i in image.instances if i.number == record.annotation_id)
    alone = image._replace(instances=(wanted,))
    loaded = work.load((alone,))
    with torch.inference_mode():
        predictions = work.answer(loaded, work.embed(loaded))
        ((_, _, masks),) = masks_by_image(work.drop_in.head, loaded, predictions.logits, 1)
    pixels = data.read(image).permute(1, 2, 0).numpy()
    category = data.categories[record.category_id]
    words = (f"{category}, area {record.area:.0f}", "ground truth", f"drawn, IoU {100 * record.iou:.1f}")
    views = (
        pixels,
        _tint(pixels, loaded[0].truth[0].numpy(), _TRUTH),
        _tint(pixels, masks[0].cpu().numpy(), _DRAWN),
    )
    return np.concatenate(
        [_view(view, wanted.box, said) for view, said in zip(views, words, strict=True)], axis=1
    )


def _tint(
    pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]
) -> NDArray[np.uint8]:
    tinted = pixels.astype(np.float32)
    tinted[mask] = 0.45 * tinted[mask] + 0.55 * np.array(colour, dtype=np.float32)
    return tinted.astype(np.uint8)


def _view(pixels: NDArray[np.uint8], box: tuple[float, float, float, float], said: str) -> NDArray[np.uint8]:
    """Draw the box on an image and a caption under it."""
    height, width = pixels.shape[:2]
    zoom = max(1, -(-_SIDE // max(height, width)))
    image = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (width * zoom + 4, height * zoom + _STRIP), (255, 255, 255))
    sheet.paste(image, (0, 0))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([value * zoom for value in box], outline=_PROMPT, width=2)
    pen.text((2, height * zoom + 3), said, fill=(0, 0, 0))
    predictions: NDArray[np.uint8] = np.asarray(sheet)
    return predictions
