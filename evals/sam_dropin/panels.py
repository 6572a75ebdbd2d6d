"""Pictures for people: an instance's prompt, its ground truth and what was drawn, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from evals.core.evaluator import Watch
from radio.images import write_png

from .annotations import Picture
from .coco import Instances
from .decoding import masks_by_picture
from .scoring import Record
from .work import Work

# Letters: H W pixels.

_SIDE = 320  # of one of the three pictures at least: small ones are enlarged in whole steps
_STRIP = 18  # pixels for the words under them
_TRUTH, _DRAWN, _PROMPT = (60, 200, 90), (240, 90, 60), (255, 220, 0)


def choose(records: Sequence[Record], count: int) -> list[tuple[str, Record]]:
    """The best, the median and the worst `count` records with the word for each, none twice.

    Equal ones go by annotation.
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
    work: Work, data: Instances, records: Sequence[Record], out: Path, watch: Watch
) -> tuple[str, ...]:
    """Draw `save_masks` panels of each kind into the folder `out`; their names in it.

    Each shows the picture with the prompt's box, the ground truth, the drawn mask, and its IoU.
    """
    chosen = choose(records, work.settings.save_masks)
    by_number = {picture.number: picture for picture in data.pictures}
    names = []
    with watch("panels", len(chosen)) as advance:
        for place, (word, record) in enumerate(chosen):
            picture = by_number[record.image_id]
            name = f"{place:02d}-{word}-{record.image_id}-{record.annotation_id}.png"
            write_png(Image.fromarray(_panel(work, data, picture, record)), out / name)
            names.append(name)
            advance(1)
    return tuple(names)


def _panel(work: Work, data: Instances, picture: Picture, record: Record) -> NDArray[np.uint8]:
    wanted = next(i for i in picture.instances if i.number == record.annotation_id)
    alone = picture._replace(instances=(wanted,))
    loaded = work.load((alone,))
    with torch.inference_mode():
        drawn = work.answer(loaded, work.embed(loaded))
        ((_, _, masks),) = masks_by_picture(work.drop_in.head, loaded, drawn.logits, 1)
    pixels = data.read(picture).permute(1, 2, 0).numpy()
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
    """One picture with the box on it and words under it."""
    height, width = pixels.shape[:2]
    zoom = max(1, -(-_SIDE // max(height, width)))
    picture = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (width * zoom + 4, height * zoom + _STRIP), (255, 255, 255))
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([value * zoom for value in box], outline=_PROMPT, width=2)
    pen.text((2, height * zoom + 3), said, fill=(0, 0, 0))
    drawn: NDArray[np.uint8] = np.asarray(sheet)
    return drawn
