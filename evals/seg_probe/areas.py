"""Areas of classes in label maps: of a split, their tables, records and overlays; without MMSegmentation."""

from __future__ import annotations

import colorsys
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from evals.core.blocks import Block, Image, ImageGrid, ImageRow, Table
from evals.core.evaluator import EvalRun, Result
from evals.core.report import Metric, Record
from evals.core.stats import area_ratios, interval, mean_present, resampled_sums, score
from radio.chunks import TensorSpec, cached_chunks, chunk_path, read_tensors, write_tensors
from radio.image_files import spread
from radio.images import write_png

from .data import VOID, Dataset, Labelling, Part, Split, read_image, read_labels
from .protocol import Size
from .reading import Fit, describe_splits, read_pairs

# Letters: N images, C classes, R resamples, H W an image's own height and width.

Areas = NDArray[np.float64]
"""[N, 3, C]: pixels per image and class in the intersection, in the prediction and in the label."""

Bytes = NDArray[np.uint8]

CHUNK = 128  # images per file: the most that an interrupted run loses
_FORMAT = f"areas/1 in chunks of {CHUNK}"


def bootstrapped(areas: Areas, seed: int = 0) -> dict[str, Metric]:
    """Compute miou, macc and aacc with 95 % intervals: percentile bootstrap over images."""
    scores = score(areas)
    iou, acc, overall = area_ratios(resampled_sums(areas, seed=seed))
    metrics = {}
    for name, values in (("miou", mean_present(iou)), ("macc", mean_present(acc)), ("aacc", overall)):
        low, high = interval(values)
        metrics[name] = Metric(value=getattr(scores, name), low=low, high=high)
    return metrics


def area_records(areas: Areas, keys: Sequence[str]) -> Iterator[Record]:
    """Yield a record per image: [class, intersection, prediction, label] in pixels.

    It holds the classes that are predicted or in the label; the sums over all records give the scores.
    """
    for key, of_classes in zip(keys, areas.astype(int), strict=True):
        present = np.flatnonzero(of_classes[1] + of_classes[2])
        yield {"id": key, "areas": np.column_stack([present, of_classes[:, present].T]).tolist()}


def class_table(heads: Sequence[Areas], classes: tuple[str, ...]) -> Table:
    """Tabulate per class IoU and accuracy in percent (means over heads), and the share of labelled pixels."""
    scores = [score(areas) for areas in heads]
    iou = np.mean([each.iou for each in scores], axis=0)
    acc = np.mean([each.acc for each in scores], axis=0)
    pixels = heads[0].sum(axis=0)[2]
    share = 100 * pixels / pixels.sum()
    rows = tuple(
        (name, _or_none(iou[index]), _or_none(acc[index]), float(share[index]))
        for index, name in enumerate(classes)
    )
    return Table(
        title="IoU of each class",
        columns=("class", "iou", "acc", "share"),
        rows=rows,
        compared="iou",
        shared="share",
    )


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def overlays(writer: MapWriter) -> list[Block]:
    """Show the overlays that a writer writes; empty without any."""
    images = []
    for index in writer.indices:
        key = writer.split.pairs[index].key
        file = f"{writer.folder.name}/{writer.names(index)[1]}"
        alt = f"{key}: image, ground truth and prediction"
        images.append(Image(file=file, alt=alt, label=key, side=340))
    title = "image, ground truth and prediction (void is clear in the truth and faint in the prediction)"
    return [ImageGrid(title=title, rows=(ImageRow(images=tuple(images)),))] if images else []


_OPACITY, _UNSCORED = 0.6, 0.2  # of a colour over the image; of a prediction where the truth is void
_FEW = 24  # classes that hues alone distinguish
_LONGEST = 200  # bytes of a name; file systems take 255, with what is added
_GAP = 4  # white columns between the three images
_TEXT = 12  # pixels: the size of the legend's letters and squares


@final
@dataclass(frozen=True, slots=True)
class MapWriter:
    """Writes `NAME.png`, the labels as the data set numbers them, and `NAME-overlay.png`."""

    folder: Path
    split: Split
    labelling: Labelling
    indices: tuple[int, ...]  # of the images to write

    def __call__(self, index: int, classes: Bytes) -> None:
        """Write the prediction [H, W] of an image, if it is among `indices`."""
        if index not in self.indices:
            return
        pair = self.split.pairs[index]
        colours = palette(len(self.labelling.classes))
        offset = int(self.labelling.zero_is_void)
        numbers = np.concatenate([np.zeros((offset, 3), np.uint8), colours])
        image = PillowImage.fromarray(classes + np.uint8(offset))
        image.putpalette(numbers.tobytes())
        write_png(image, self.folder / self.names(index)[0])
        pixels = read_image(pair).numpy().transpose(1, 2, 0)
        truth = read_labels(pair.labels, self.labelling)
        shown = side_by_side(pixels, truth, classes, colours)
        seen = np.union1d(truth[truth != VOID], classes)
        key = legend([(self.labelling.classes[n], colours[n]) for n in seen], shown.shape[1])
        shown = np.concatenate([shown, key])
        write_png(PillowImage.fromarray(shown), self.folder / self.names(index)[1])

    def names(self, index: int) -> tuple[str, str]:
        """Return the two file names of an image in the folder."""
        stem = self.split.pairs[index].key
        if len(stem.encode()) > _LONGEST:
            stem = f"{stem[:40]}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}"
        return f"{stem}.png", f"{stem}-overlay.png"

    def files(self) -> tuple[str, ...]:
        """List all files, relative to the folder's parent."""
        return tuple(f"{self.folder.name}/{name}" for index in self.indices for name in self.names(index))


def palette(count: int) -> Bytes:
    """Choose distinct colours [C, 3]; neighbours in hue differ in brightness too."""
    golden = (5**0.5 - 1) / 2
    few = count <= _FEW
    hues = [index / count if few else index * golden % 1 for index in range(count)]
    levels = ((0.9, 1.0), (0.9, 0.55)) if few else ((0.9, 1.0), (0.9, 0.55), (0.5, 0.9))
    rows = [colorsys.hsv_to_rgb(hue, *levels[index % len(levels)]) for index, hue in enumerate(hues)]
    return np.round(255 * np.array(rows)).astype(np.uint8)


def side_by_side(image: Bytes, truth: Bytes, classes: Bytes, colours: Bytes) -> Bytes:
    """Draw the image [H, W, 3], and truth and prediction [H, W] over it: [H, 3 W + gaps, 3].

    Void is transparent in the truth; the prediction there, which is not scored, is faint.
    """
    gap = np.full((image.shape[0], _GAP, 3), 255, dtype=np.uint8)
    scored = truth != VOID
    shown_truth = _over(image, np.where(scored, truth, 0), colours, np.where(scored, _OPACITY, 0.0))
    shown = _over(image, classes, colours, np.where(scored, _OPACITY, _UNSCORED))
    return np.concatenate([image, gap, shown_truth, gap, shown], axis=1)


def legend(entries: Sequence[tuple[str, Bytes]], width: int) -> Bytes:
    """Draw the legend [h, width, 3]: on white, each name after a square of its colour, in lines that fit."""
    font = ImageFont.load_default(_TEXT)
    places, x, y = [], _TEXT // 2, _TEXT // 2
    for name, _ in entries:
        wide = 2 * _TEXT + math.ceil(font.getlength(name))
        if x + wide > width and x > _TEXT:
            x, y = _TEXT // 2, y + 3 * _TEXT // 2
        places.append((x, y))
        x += wide
    image = PillowImage.new("RGB", (width, y + 3 * _TEXT // 2), "white")
    pen = ImageDraw.Draw(image)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        pen.rectangle((left, top, left + _TEXT, top + _TEXT), fill=tuple(colour.tolist()))
        pen.text((left + 5 * _TEXT // 4, top + _TEXT / 2), name, fill="black", font=font, anchor="lm")
    return np.array(image)


def _over(image: Bytes, classes: Bytes, colours: Bytes, opacity: NDArray[np.float64]) -> Bytes:
    share = opacity[..., None]
    return np.round(share * colours[classes] + (1 - share) * image).astype(np.uint8)


Predict = Callable[[Tensor, Sequence[Size]], list[Bytes]]
"""Labels images [B, 3, h, w]: the class of every pixel, [H, W] of each of the sizes given."""


def score_split(
    split: Split,
    labelling: Labelling,
    predict: Predict,
    run: EvalRun,
    *,
    fit: Fit,
    batch: int,
    key: Sequence[object],
    label: str,
) -> Areas:
    """Predict every image of a split, and return its areas; the ranks divide the work, and it is resumed.

    Args:
        fit: gives the size at which the model sees an image; the same for all images of a batch.
        key: everything that determines the predictions, except the images.
        label: of the progress bar.

    Raises:
        DataError: ranks do not share the cache folder.
        RadioError: as `predict` says.
    """
    folder = _folder(run, split, labelling, key)
    count, num_classes = len(split.pairs), len(labelling.classes)
    spans = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]

    def read(path: Path) -> Tensor:
        shape = (len(spans[int(path.stem)]), 3, num_classes)
        return read_tensors(path, {"areas": TensorSpec(torch.int64, shape)}).tensors["areas"]

    def make(missing: list[int]) -> None:
        with run.progress(label, sum(len(spans[number]) for number in missing)) as advance:
            for number in missing:
                areas = []
                for pairs in read_pairs(split, labelling, spans[number], fit, batch=batch, run=run):
                    maps = predict(pairs.images, [each.shape for each in pairs.labels])
                    areas += list(map(partial(count_areas, num_classes), maps, pairs.labels))
                    advance(len(maps))
                write_tensors(chunk_path(folder, number), {"areas": torch.from_numpy(np.stack(areas))})

    paths = cached_chunks(folder, len(spans), read=read, make=make, ranks=run.ranks, damage=run.damage)
    return torch.cat([read(path) for path in paths]).double().numpy()


def _folder(run: EvalRun, split: Split, labelling: Labelling, key: Sequence[object]) -> Path:
    """Return the cache folder of a split's predictions."""
    text = json.dumps([_FORMAT, split.fingerprint, labelling.to_json(), *key])
    return run.cache / "areas" / hashlib.sha256(text.encode()).hexdigest()


def _save_maps(writer: MapWriter, predict: Predict, run: EvalRun, *, fit: Fit, key: Sequence[object]) -> None:
    """Write a writer's maps and overlays; the ranks divide the predictions, which are cached."""
    split, labelling, indices = writer.split, writer.labelling, writer.indices
    folder = _folder(run, split, labelling, key) / f"maps-{len(indices)}"

    def read(path: Path) -> Tensor:
        return read_tensors(path, {"map": TensorSpec(torch.uint8, (None, None))}).tensors["map"]

    def make(missing: list[int]) -> None:
        wanted = [indices[number] for number in missing]
        for pairs in read_pairs(split, labelling, wanted, fit, batch=1, run=run):
            predicted = predict(pairs.images, [pairs.labels[0].shape])[0]
            path = chunk_path(folder, indices.index(pairs.indices[0]))
            write_tensors(path, {"map": torch.from_numpy(predicted)})

    paths = cached_chunks(folder, len(indices), read=read, make=make, ranks=run.ranks, damage=run.damage)
    if run.ranks.leads:
        for index, path in zip(indices, paths, strict=True):
            writer(index, read(path).numpy())


def count_areas(num_classes: int, predicted: Bytes, labels: Bytes) -> NDArray[np.int64]:
    """Count each class's labelled pixels in the intersection, the prediction and the label: [3, C]."""
    scored = labels != VOID
    predicted, labels = predicted[scored], labels[scored]
    rows = (predicted[predicted == labels], predicted, labels)
    return np.stack([np.bincount(row, minlength=num_classes) for row in rows])


def score_labels(
    data: Dataset,
    predict: Predict,
    run: EvalRun,
    *,
    fit: Fit,
    batch: int,
    key: Sequence[object],
    label: str,
    parts: Sequence[Part],
    save_maps: int,
    resolved: Mapping[str, object],
) -> Result:
    """Return the scores of the labels that are predicted for the validation split; see `score_split`.

    Args:
        parts: the splits that were used.
        save_maps: number of images whose maps and overlays are saved. These are predicted again and cached,
            which is cheaper than to cache the maps of all.
        resolved: what default settings came to.
    """
    split, labelling = data.val, data.labelling
    areas = score_split(split, labelling, predict, run, fit=fit, batch=batch, key=key, label=label)
    writer = MapWriter(
        folder=run.folder / f"{run.base}-maps",
        split=split,
        labelling=labelling,
        indices=spread(range(len(split.pairs)), save_maps) if save_maps else (),
    )
    _save_maps(writer, predict, run, fit=fit, key=key)
    return Result(
        metrics=bootstrapped(areas, run.settings.seed),
        pairing="mean_iou",
        data=describe_splits(data, parts),
        records=area_records(areas, [pair.key for pair in split.pairs]),
        blocks=[class_table([areas], labelling.classes), *overlays(writer)],
        resolved={**resolved, "labels": labelling.describe()},
        files=writer.files(),
        notes=data.notes,
    )
