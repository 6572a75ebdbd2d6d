"""The student with SAM's own decoder (paper, section 5.3 and table 8), scored on COCO instances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw

from evals.core.blocks import Bars, Block, Image, ImageGrid, ImageRow, Table
from evals.core.evaluator import EvalRun, Result
from evals.core.report import DatasetInfo, Metric, Record
from evals.core.stats import interval, resampled_sums
from radio.chunks import DamagedError
from radio.errors import ConfigError, require
from radio.images import write_png
from radio.scenes.export import CARD_VERSION, ScenesSettings, write_cached
from radio.types import Backbone

from . import SamSettings
from .annotations import CocoImage
from .data import Instances, open_detections, open_instances
from .encoder import make_drop_in
from .precision import average_precision, draw_thresholds
from .prediction import Chunk, EncodedMask, MaskScore, Predictor

# Letters: N instances, H W pixels, R resamples.


_SMALL, _LARGE = 32**2, 96**2  # pixels; an area equal to a limit belongs to both sizes, as in COCOeval
_BARS = {
    "miou": "all",
    "miou_small": "small",
    "miou_medium": "medium",
    "miou_large": "large",
    "boundary_miou": "boundaries",
    "filled_box_miou": "filled box",
}
_PANELS = 3  # of the best, the median and the worst instances


def missing_requirements(model: Backbone) -> str:
    """Describe what the model lacks if it is neither a SAM nor distilled from one; empty if nothing."""
    try:
        drop_in = make_drop_in(model, None, None, 0)
    except ConfigError as error:
        return str(error)
    return drop_in.notes[0] if drop_in.is_untrained else ""


def evaluate(model: Backbone, settings: SamSettings, run: EvalRun) -> Result:
    """Score the masks of SAM's decoder on a student of a SAM, or on a SAM's own encoder.

    Raises:
        ConfigError: a model that was not distilled from a SAM.
        CheckpointError: SAM's weights are not at the path in the checkpoint.
        SizeError: a size or window that does not fit; names the nearest that does.
        DataError: data that are missing, damaged, or contain nothing to score.
        MissingExtraError: segment-anything, pycocotools or scipy is not installed.
    """
    for module in ("segment_anything", "pycocotools", "scipy"):  # fail early
        require(module, extra="sam")
    drop_in = make_drop_in(model, settings.sam_checkpoint, settings.size, run.settings.seed, settings.teacher)
    data, detected = _open(settings, run)
    run.note_source(data.files)  # the leading rank hashes the images
    predictor = Predictor(
        drop_in,
        data,
        run,
        clicks=settings.clicks if settings.prompts == "points" else 0,
        union_bias=1e-7 if settings.protocol == "efficientvit-2025" else 0.0,
        prompt_batch=settings.box_batch,
        keep_embeddings=settings.keep_embeddings,
        has_truth=detected is None,
    )
    used = DatasetInfo(
        role="images",
        name=data.name,
        fingerprint=data.fingerprint,
        count=len(data.images),
        num_classes=len(data.categories),
    )
    resolved = {
        "size": drop_in.side,
        "decoder": drop_in.head.name,
        "frame": drop_in.head.side,
        "box_batch": predictor.prompt_batch,
        "annotations": data.count,
    }
    if detected is not None:
        detections = open_detections(detected, data)
        chunks = predictor.score_all(detections.images, detections.fingerprint, detections.name)
        masks = [each for chunk in chunks for each in chunk.records if isinstance(each, EncodedMask)]
        count = f"{len(masks)} detections on {len(detections.images)} of {len(data.images)} images"
        metrics = average_precision(detections, masks, settings.score_thresholds)
        return Result(
            metrics={**metrics, **_rates(chunks)},
            data=[used],
            blocks=draw_thresholds(metrics, settings.score_thresholds),
            records=(
                {
                    "id": mask.entry,
                    "unit": mask.image_id,
                    "quality": mask.quality,
                    "size": list(mask.size),
                    "counts": mask.counts,
                }
                for mask in masks
            ),
            notes=[*drop_in.notes, count, *detections.notes, *data.notes],
            resolved=resolved,
        )
    chunks = predictor.score_all(data.images, data.fingerprint, data.name)
    scores = [each for chunk in chunks for each in chunk.records if isinstance(each, MaskScore)]
    metrics = mask_metrics(scores, run.settings.seed)
    num_panels = _PANELS if settings.save_masks is None else settings.save_masks
    panels = _write_panels(predictor, scores, num_panels) if num_panels else []
    grid = [ImageGrid(title="prompt, ground truth and predicted mask", rows=tuple(panels))] if panels else []
    crowds = sum(score.crowd for score in scores)
    notes = [f"{len(scores)} annotations on {len(data.images)} images, {crowds} of them crowds"]
    if settings.prompts == "boxes":
        notes.append(
            f"a box alone goes a long way: the prompt taken as the mask has an mIoU of "
            f"{metrics['filled_box_miou'].value:.1f}"
        )
    return Result(
        metrics={**metrics, **_rates(chunks)},
        baselines={"filled box": metrics["filled_box_miou"].value},
        data=[used],
        records=_score_records(scores, data),
        blocks=[_bars(metrics), category_table(scores, data.categories), *grid],
        notes=[*drop_in.notes, *notes, *data.notes],
        resolved=resolved,
        files=[image.file for row in panels for image in row.images],
    )


def _open(settings: SamSettings, run: EvalRun) -> tuple[Instances, Path | None]:
    """Open the instances; return them, and a detector's file, if its boxes are the prompts."""
    file, images, name, location = settings.data, settings.images, None, None
    detected = settings.detections
    if file is None or images is None:
        seed, layout = run.settings.seed, "coco" if detected is None else "lvis"
        root = run.cache / "scenes" / f"{layout}-v{CARD_VERSION}-{settings.scenes}-seed{seed}"
        world = ScenesSettings(layout=layout, count=1, val_count=settings.scenes, seed=seed)
        damaged = lambda reason: run.damage.add(DamagedError(reason))  # noqa: E731
        run.ranks.on_leader(lambda: write_cached(root, world, damaged))
        folder, images = root / "annotations", root / "val"
        file = folder / ("instances_val.json" if detected is None else "lvis_val.json")
        detected = detected and folder / "detections_val.json"
        name, location = "scenes:val", f"scenes:val?seed={seed}"
    instances = open_instances(
        file,
        images,
        limit=run.settings.limit,
        crowds=settings.crowds,
        smallest_area=1.0 if settings.protocol == "efficientvit-2025" else 0.0,
        memo=run.fingerprints,
        empty=detected is not None,
        name=name,
        location=location,
        watch=run.progress,
    )
    return instances, detected


def mask_metrics(scores: Sequence[MaskScore], seed: int) -> dict[str, Metric]:
    """Compute mIoU in percent over all instances and by size, boundary mIoU, and mIoU of the filled boxes.

    Sizes are defined by the annotation's area; a size without instances is omitted. Intervals are bootstraps
    over images.
    """
    images = np.unique([score.image_id for score in scores], return_inverse=True)[1]
    areas = np.array([score.area for score in scores])
    ious = np.array([score.iou for score in scores])
    everywhere = np.ones(len(scores), dtype=bool)
    chosen: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {
        "miou": (ious, everywhere),
        "miou_small": (ious, areas <= _SMALL),
        "miou_medium": (ious, (areas >= _SMALL) & (areas <= _LARGE)),
        "miou_large": (ious, areas >= _LARGE),
        "boundary_miou": (np.array([score.boundary_iou for score in scores]), everywhere),
        "filled_box_miou": (np.array([score.box_iou for score in scores]), everywhere),
    }
    chosen = {name: (values, kept) for name, (values, kept) in chosen.items() if kept.any()}
    sums = [
        np.bincount(images, weights=weights)
        for values, kept in chosen.values()
        for weights in (values * kept, kept)
    ]
    resampled = resampled_sums(np.stack(sums, axis=1), seed=seed)
    metrics = {}
    for number, (name, (values, kept)) in enumerate(chosen.items()):
        with np.errstate(invalid="ignore"):  # resamples without an instance of this size are omitted
            low, high = interval(resampled[:, 2 * number] / resampled[:, 2 * number + 1])
        metrics[name] = Metric(value=100 * float(values[kept].mean()), low=100 * low, high=100 * high)
    return metrics


def category_table(scores: Sequence[MaskScore], categories: Mapping[int, str]) -> Table:
    """Tabulate the categories among the instances: name, number of instances, and mIoU in percent."""
    ious: dict[int, list[float]] = {id: [] for id in categories}
    for score in scores:
        ious[score.category_id].append(score.iou)
    rows = tuple(
        (categories[id], len(values), 100 * sum(values) / len(values))
        for id, values in ious.items()
        if values
    )
    return Table(
        title="mIoU of each category",
        columns=("category", "instances", "miou"),
        rows=rows,
        compared="miou",
        shared="instances",
    )


def _bars(metrics: Mapping[str, Metric]) -> Block:
    shown = [name for name in _BARS if name in metrics]
    return Bars(
        title="mIoU over all, by size, of boundaries, and of the box alone",
        x_label="mIoU (%)",
        names=tuple(_BARS[name] for name in shown),
        values=tuple(metrics[name].value for name in shown),
        low=tuple(metrics[name].low for name in shown),
        high=tuple(metrics[name].high for name in shown),
        caption="Mean IoU over instances, with 95 % intervals over images.",
    )


def _score_records(scores: Sequence[MaskScore], data: Instances) -> Iterator[Record]:
    names = (image.name for image in data.images for _ in image.instances)
    for score, name in zip(scores, names, strict=True):
        yield {
            "id": score.annotation_id,
            "unit": score.image_id,
            "score": score.iou,
            "image": name,
            "category_id": score.category_id,
            "area": score.area,
            "crowd": score.crowd,
            "quality": score.quality,
            "boundary_iou": score.boundary_iou,
            "box_iou": score.box_iou,
        }


def _rates(chunks: Sequence[Chunk]) -> dict[str, Metric]:
    """Compute the images/s of encoder and decoder, without the first chunk (warm-up) if there are more."""
    laps = {
        "encoder_rate": [(c.images, c.encoder_seconds) for c in chunks if c.encoder_seconds is not None],
        "decoder_rate": [(c.images, c.decoder_seconds) for c in chunks],
    }
    rates = {}
    for name, of_part in laps.items():
        kept = of_part[1:] or of_part
        if kept:
            rate = sum(images for images, _ in kept) / sum(seconds for _, seconds in kept)
            rates[name] = Metric(value=rate, unit="images/s")
    return rates


_MIN_SIDE = 320  # pixels of a panel's images: small ones are enlarged by an integer factor
_CAPTION = 18  # pixels for the caption under each image
_TRUTH, _PREDICTED, _PROMPT = (60, 200, 90), (240, 90, 60), (255, 220, 0)


def choose(scores: Sequence[MaskScore], count: int) -> dict[str, list[MaskScore]]:
    """Choose the best, the median and the worst `count` instances, none twice.

    Ties are ordered by annotation id.
    """
    order = sorted(scores, key=lambda score: (-score.iou, score.annotation_id))
    middle = max((len(order) - count) // 2, 0)
    parts = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:]}
    chosen: dict[int, tuple[str, MaskScore]] = {}
    for kind, part in parts.items():
        for score in part:
            chosen.setdefault(score.annotation_id, (kind, score))
    return {kind: [score for label, score in chosen.values() if label == kind] for kind in parts}


def _write_panels(predictor: Predictor, scores: Sequence[MaskScore], count: int) -> list[ImageRow]:
    """Draw `count` panels of each kind beside the report.

    Each shows the image with the prompt's box, the ground truth, the predicted mask, and its IoU.
    """
    run, data, number = predictor.run, predictor.data, 0
    rows: list[ImageRow] = []
    chosen = choose(scores, count)
    by_id = {image.id: image for image in data.images}
    with run.progress("panels", sum(map(len, chosen.values()))) as advance:
        for kind, part in chosen.items():
            panels = []
            for score in part:
                name = f"{run.base}/{number:02d}-{kind}-{score.image_id}-{score.annotation_id}.png"
                if run.ranks.leads:
                    panel = _panel(predictor, by_id[score.image_id], score)
                    write_png(PillowImage.fromarray(panel), run.folder / name)
                label = f"IoU {100 * score.iou:.1f}, image {score.image_id}"
                alt = f"{kind}: {label}, {data.categories[score.category_id]}"
                panels.append(Image(file=name, alt=alt, label=label, side=480))
                number += 1
                advance(1)
            rows += [ImageRow(images=tuple(panels), name=kind)] if panels else []
    return rows


def _panel(predictor: Predictor, image: CocoImage, score: MaskScore) -> NDArray[np.uint8]:
    instance = next(each for each in image.instances if each.id == score.annotation_id)
    loaded = predictor.load((image._replace(instances=(instance,)),))
    with torch.inference_mode():
        predictions = predictor.predict(loaded, predictor.embed(loaded))
        ((_, _, masks),) = predictor.masks_by_image(loaded, predictions.logits)
    data = predictor.data
    pixels = data.read(image).permute(1, 2, 0).numpy()
    views = (
        (pixels, f"{data.categories[score.category_id]}, area {score.area:.0f}"),
        (_tint(pixels, loaded[0].truth[0].numpy(), _TRUTH), "ground truth"),
        (_tint(pixels, masks[0].cpu().numpy(), _PREDICTED), f"drawn, IoU {100 * score.iou:.1f}"),
    )
    return np.concatenate([_view(view, instance.box, caption) for view, caption in views], axis=1)


def _tint(
    pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]
) -> NDArray[np.uint8]:
    tinted = pixels.astype(np.float32)
    tinted[mask] = 0.45 * tinted[mask] + 0.55 * np.array(colour, dtype=np.float32)
    return tinted.astype(np.uint8)


def _view(
    pixels: NDArray[np.uint8], box: tuple[float, float, float, float], caption: str
) -> NDArray[np.uint8]:
    """Draw the box on an image and a caption under it."""
    height, width = pixels.shape[:2]
    zoom = max(1, -(-_MIN_SIDE // max(height, width)))
    image = PillowImage.fromarray(pixels).resize(
        (width * zoom, height * zoom), PillowImage.Resampling.NEAREST
    )
    sheet = PillowImage.new("RGB", (width * zoom + 4, height * zoom + _CAPTION), (255, 255, 255))
    sheet.paste(image, (0, 0))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([value * zoom for value in box], outline=_PROMPT, width=2)
    pen.text((2, height * zoom + 3), caption, fill=(0, 0, 0))
    return np.asarray(sheet)
