"""The segmentation probe: a linear map from frozen tokens to every pixel's class."""

from __future__ import annotations

import colorsys
import contextlib
import hashlib
import io
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, final

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from evals.core.blocks import Block, Image, ImageGrid, ImageRow, Table
from evals.core.evaluator import EvalRun, Result
from evals.core.features import place
from evals.core.last_blocks import LastBlocks
from evals.core.report import DatasetInfo, Metric, Record
from evals.core.stats import area_ratios, interval, mean_present, resampled_sums, score
from radio.chunks import DamagedError
from radio.config import to_plain
from radio.errors import ConfigError, MissingExtraError, require
from radio.image_files import spread
from radio.images import write_png
from radio.io import write_bytes
from radio.resources import check_memory
from radio.scenes.export import CARD_VERSION, ScenesSettings, write_cached
from radio.types import Backbone

from .data import VOID, Checked, Dataset, Labelling, Split, check_split, open_dataset, read_image, read_labels
from .protocol import SegSettings, check_sizes, choose_attention, resolve

if TYPE_CHECKING:
    from .plugin import Areas

# Letters: N images, C classes, R resamples, H W an image's own height and width.


def load_plugin() -> ModuleType:
    """Import the module `plugin`, which registers our parts in MMSegmentation, without warnings and output.

    Raises:
        MissingExtraError: the extra `seg` is not installed, or a system library that OpenCV needs.
    """
    # The import warns of compiled operators that are not used here, and prints 'Could not import OneDL'.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        _require_opencv()
        for module in ("mmengine", "mmcv", "mmseg"):
            require(module, extra="seg")
        from . import plugin
    return plugin


def _require_opencv() -> None:
    try:
        require("cv2", extra="seg")
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # a shared library that the wheel does not contain
        name = str(error).split(":")[0]
        package = "libgl1" if "libGL" in name else "libglib2.0-0"
        raise MissingExtraError(
            f"OpenCV cannot be loaded, {error}; on Debian and Ubuntu install {package}: "
            f"apt-get install {package}"
        ) from error


def evaluate(model: Backbone, settings: SegSettings, run: EvalRun) -> Result:
    """Score a backbone with a linear head on its tokens, trained and tested by MMSegmentation.

    The records have one line per image with its areas for the first head, which is saved too. An interrupted
    run resumes from the last saved iteration; a finished head is only tested.

    Raises:
        DataError: data in an unknown layout, or with an invalid file; names the first.
        ConfigError: a batch that does not divide among the ranks, or a backbone without so many layers.
        SizeError: a crop or stride that does not fit the backbone.
        MissingExtraError: MMSegmentation, or a system library that OpenCV needs, is not installed.
        RadioError: values that are not finite.
    """
    plugin = load_plugin()  # fail early
    from .plugin import Images, TokenMaps, map_size, token_maps
    from .training import Probe, train_head

    started = time.monotonic()
    model, attention_notes = choose_attention(settings, model)
    if settings.layers > 1:
        model = LastBlocks(model, settings.layers)
    config, notes = resolve(settings, model)
    notes = (*attention_notes, *notes)
    if config.train_batch_size % run.ranks.world:
        raise ConfigError(
            f"a batch of {config.train_batch_size} does not divide among {run.ranks.world} ranks; choose "
            f"another --train-batch-size"
        )
    check_memory(model, config.train_batch_size // run.ranks.world, config.crop, run.device, run.dtype)
    data, checked = _open_and_check(settings, run, plugin.KNOWN_CLASSES)
    check_sizes([size for split in checked for size in split.sizes], config, model)
    key = [model.fingerprint, run.precision]
    placed = place(model, run.device, run.dtype)
    splits = ((data.train, True), (data.val, False))
    samples: list[Any] = [
        Images(split, data.labelling, config, placed, training=training) for split, training in splits
    ]
    if not config.augment and settings.keep_tokens:
        count = sum(map(len, samples))
        size = map_size(placed, config.crop, run) * count / 1e9
        if size <= settings.token_cache_gb:
            for index, (split, training) in enumerate(splits):
                maps = token_maps(
                    placed,
                    samples[index],
                    run,
                    key=[*key, split.fingerprint, config.crop],
                    label=f"{model.name} on {split.name}",
                )
                samples[index] = TokenMaps(maps, split, data.labelling, config, training=training)
        else:
            note = (
                f"the tokens of {count:,} images would take {size:.1f} GB, so they were not kept "
                f"(--token-cache-gb {settings.token_cache_gb:g})"
            )
            notes = (*notes, note)
    probe = Probe(
        model=placed,
        config=config,
        num_classes=len(data.labelling.classes),
        train=samples[0],
        val=samples[1],
        key=[*key, data.train.fingerprint, to_plain(config)],
        save_every=settings.save_every,
    )
    prepared = time.monotonic()

    writer = MapWriter(
        folder=run.folder / f"{run.base}-maps",
        split=data.val,
        labelling=data.labelling,
        indices=spread(range(len(data.val.pairs)), settings.save_maps) if settings.save_maps else (),
    )
    first = run.settings.seed if settings.head_seed is None else settings.head_seed
    seeds = range(first, first + settings.seeds)
    heads = [
        train_head(
            probe,
            seed,
            run,
            model.name if len(seeds) == 1 else f"{model.name}, seed {seed}",
            writer if seed == first else None,
        )
        for seed in seeds
    ]
    weights = f"{run.base}.safetensors"
    if run.ranks.leads:
        tensors = {name: tensor.contiguous() for name, tensor in heads[0].weights.items()}
        write_bytes(run.folder / weights, safetensors.torch.save(tensors))
    areas = [head.areas for head in heads]
    return Result(
        metrics=bootstrapped(areas[0]) if len(areas) == 1 else repeated(areas),
        pairing="mean_iou",
        data=[
            DatasetInfo(
                role=role,
                name=split.name,
                fingerprint=split.fingerprint,
                count=len(split.pairs),
                num_classes=len(data.labelling.classes),
                scored=role == "val",
            )
            for role, split in (("train", data.train), ("val", data.val))
        ],
        records=area_records(areas[0], [pair.key for pair in data.val.pairs]),
        blocks=[
            class_table(areas, data.labelling.classes),
            *([_seed_table(areas, seeds)] if len(seeds) > 1 else []),
            *_overlays(writer),
        ],
        resolved={
            **config.describe(),
            "labels": data.labelling.describe(),
            "tokens": "kept, float16" if probe.keeps_tokens else "computed in every iteration",
            **({"attention": "global"} if attention_notes else {}),
        },
        seconds={"preparation": prepared - started, "heads": time.monotonic() - prepared},
        files=[weights, *writer.files()],
        notes=[*notes, *data.notes, *_orientation_notes(data, checked)],
    )


def _open_and_check(
    settings: SegSettings, run: EvalRun, known: Mapping[str, Sequence[str]]
) -> tuple[Dataset, list[Checked]]:
    """Open the data, and validate every file; see `open_dataset` and `check_split`."""
    data = _open(settings, run, known)
    both = (data.train, data.val)
    check = partial(
        check_split, labelling=data.labelling, memo=run.fingerprints, progress=run.progress, damage=run.damage
    )
    checked = [run.ranks.on_leader(partial(check, split)) for split in both]
    train, val = (
        replace(split, fingerprint=result.fingerprint) for split, result in zip(both, checked, strict=True)
    )
    for split in (train, val):
        run.note_source(split)
    return replace(data, train=train, val=val), checked


def _open(settings: SegSettings, run: EvalRun, known: Mapping[str, Sequence[str]]) -> Dataset:
    limit = run.settings.limit
    if settings.data is not None:
        return open_dataset(settings.data, voc_split=settings.voc_split, known=known, limit=limit)
    (count, val_count), seed = settings.scenes, run.settings.seed
    world = ScenesSettings(layout="ade20k", count=count, val_count=val_count, seed=seed)
    root = run.cache / "scenes" / f"ade20k-v{CARD_VERSION}-{count}-{val_count}-seed{seed}"
    damaged = lambda reason: run.damage.add(DamagedError(reason))  # noqa: E731
    run.ranks.on_leader(lambda: write_cached(root, world, damaged))
    data = open_dataset(root, voc_split=settings.voc_split, known=known, limit=limit)
    train, val = (
        replace(split, name=f"scenes:{name}", location=f"scenes:{name}?seed={seed}")
        for name, split in (("train", data.train), ("val", data.val))
    )
    return Dataset(labelling=data.labelling, train=train, val=val)


def _orientation_notes(data: Dataset, checked: Sequence[Checked]) -> list[str]:
    return [
        f"{result.rotated:,} of {len(split.pairs):,} images of {split.name} have an EXIF orientation, which "
        f"is not applied: their annotations are taken to lie as the pixels are stored"
        for split, result in zip((data.train, data.val), checked, strict=True)
        if result.rotated
    ]


def bootstrapped(areas: Areas, seed: int = 0) -> dict[str, Metric]:
    """Compute miou, macc and aacc with 95 % intervals: percentile bootstrap over images."""
    scores = score(areas)
    iou, acc, overall = area_ratios(resampled_sums(areas, seed=seed))
    metrics = {}
    for name, values in (("miou", mean_present(iou)), ("macc", mean_present(acc)), ("aacc", overall)):
        low, high = interval(values)
        metrics[name] = Metric(value=getattr(scores, name), low=low, high=high)
    return metrics


def repeated(heads: Sequence[Areas]) -> dict[str, Metric]:
    """Compute the mean scores of several heads, with their standard deviation (n - 1)."""
    scores = [score(areas) for areas in heads]
    metrics = {}
    for name in ("miou", "macc", "aacc"):
        values = torch.tensor([getattr(each, name) for each in scores]).double()
        metrics[name] = Metric(value=float(values.mean()), std=float(values.std()))
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


def _seed_table(heads: Sequence[Areas], seeds: Sequence[int]) -> Table:
    scores = [score(areas) for areas in heads]
    rows = tuple((seed, each.miou, each.macc, each.aacc) for seed, each in zip(seeds, scores, strict=True))
    return Table(title="scores of each head", columns=("seed", "miou", "macc", "aacc"), rows=rows)


def _overlays(writer: MapWriter) -> list[Block]:
    images = []
    for index in writer.indices:
        key = writer.split.pairs[index].key
        file = f"{writer.folder.name}/{writer.names(index)[1]}"
        alt = f"{key}: image, ground truth and prediction"
        images.append(Image(file=file, alt=alt, label=key, side=340))
    title = "image, ground truth and prediction (void is clear in the truth and faint in the prediction)"
    return [ImageGrid(title=title, rows=(ImageRow(images=tuple(images)),))] if images else []


Bytes = NDArray[np.uint8]

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
