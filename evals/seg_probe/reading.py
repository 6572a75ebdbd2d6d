"""Data sets of label maps, opened and checked for a run, and their images with labels, read in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from evals.core.evaluator import EvalRun
from evals.core.report import DatasetInfo
from radio.chunks import DamagedError
from radio.images import resize
from radio.scenes.export import CARD_VERSION, ScenesSettings, write_cached

from .classes import KNOWN_CLASSES
from .data import Checked, Dataset, Labelling, Part, Split, check_split, read_image, read_labels
from .layouts import open_dataset
from .protocol import Layout, Size

# Letters: B batch, H W an image's own height and width, h w those of the model's input.


def open_checked(
    root: Path | None,
    run: EvalRun,
    *,
    scenes: tuple[int, int],
    voc_split: str | None = None,
    layout: Layout | None = None,
    parts: Sequence[Part] = ("train", "val"),
    background: bool = True,
) -> tuple[Dataset, list[Checked]]:
    """Open a data set, and validate every file of some of its splits; see `open_dataset` and `check_split`.

    Args:
        root: its folder; None: the generated world, with `scenes` training and validation images.
        parts: the splits that are used.
        background: whether a class of that name is scored; else its pixels are void.

    Returns:
        The data set, with the fingerprints of these splits and notes on their images, and what the check of
        each found.
    """
    if root is None:
        data = _open_scenes(run, scenes, voc_split)
    else:
        limit = run.settings.limit
        data = open_dataset(
            root, voc_split=voc_split, known=KNOWN_CLASSES, limit=limit, layout=layout, parts=parts
        )
    if not background and data.labelling.has_background:
        data = replace(data, labelling=replace(data.labelling, background_is_void=True))
    check = partial(
        check_split, labelling=data.labelling, memo=run.fingerprints, progress=run.progress, damage=run.damage
    )
    checked, notes = [], list(data.notes)
    for part in parts:
        split: Split = getattr(data, part)
        found = run.ranks.on_leader(partial(check, split))
        split = replace(split, fingerprint=found.fingerprint)
        data = replace(data, train=split) if part == "train" else replace(data, val=split)
        run.note_source(split)
        checked.append(found)
        if found.rotated:
            notes.append(
                f"{found.rotated:,} of {len(split.pairs):,} images of {split.name} have an EXIF orientation, "
                f"which is not applied: their annotations are taken to lie as the pixels are stored"
            )
    return replace(data, notes=tuple(notes)), checked


def _open_scenes(run: EvalRun, scenes: tuple[int, int], voc_split: str | None) -> Dataset:
    (count, val_count), seed = scenes, run.settings.seed
    world = ScenesSettings(layout="ade20k", count=count, val_count=val_count, seed=seed)
    root = run.cache / "scenes" / f"ade20k-v{CARD_VERSION}-{count}-{val_count}-seed{seed}"
    damaged = lambda reason: run.damage.add(DamagedError(reason))  # noqa: E731
    run.ranks.on_leader(lambda: write_cached(root, world, damaged))
    data = open_dataset(root, voc_split=voc_split, known=KNOWN_CLASSES, limit=run.settings.limit)
    train, val = (
        replace(split, name=f"scenes:{name}", location=f"scenes:{name}?seed={seed}")
        for name, split in (("train", data.train), ("val", data.val))
    )
    return Dataset(labelling=data.labelling, train=train, val=val)


def describe_splits(data: Dataset, parts: Sequence[Part] = ("train", "val")) -> list[DatasetInfo]:
    """Describe some splits for a report; the validation split is the scored one."""
    splits: dict[Part, Split] = {"train": data.train, "val": data.val}
    return [
        DatasetInfo(
            role=part,
            name=splits[part].name,
            fingerprint=splits[part].fingerprint,
            count=len(splits[part].pairs),
            num_classes=len(data.labelling.classes),
            scored=part == "val",
        )
        for part in parts
    ]


class Pairs(NamedTuple):
    """Images of one size with their labels."""

    indices: list[int]  # in the split
    images: Tensor  # [B, 3, h, w] float in [0, 1]
    labels: list[NDArray[np.uint8]]  # [H, W] each; no tensors, which cost a worker a file descriptor each


Fit = Callable[[int, int], Size]
"""Maps an image's (height, width) to the size at which the model sees it."""


def read_pairs(
    split: Split, labelling: Labelling, indices: Sequence[int], fit: Fit, *, batch: int, run: EvalRun
) -> Iterator[Pairs]:
    """Read images, each resized whole, and their labels, in batches in the order of `indices`.

    Args:
        fit: gives the same size for all images of a batch.

    Raises:
        DataError: a file has changed since it was checked.
    """
    yield from DataLoader(
        _Pairs(split, labelling, fit),
        batch_sampler=[list(indices[start : start + batch]) for start in range(0, len(indices), batch)],
        num_workers=run.workers,
        collate_fn=_collate,
        pin_memory=run.device.type == "cuda",
    )


_Item = tuple[int, Tensor, NDArray[np.uint8]]


@final
class _Pairs(TorchDataset[_Item]):
    def __init__(self, split: Split, labelling: Labelling, fit: Fit) -> None:
        self._split, self._labelling, self._fit = split, labelling, fit

    def __getitem__(self, index: int) -> _Item:
        pair = self._split.pairs[index]
        image = read_image(pair)
        size = self._fit(image.shape[1], image.shape[2])
        return index, resize(image, size), read_labels(pair.labels, self._labelling)


def _collate(items: Sequence[_Item]) -> Pairs:
    indices, images, labels = zip(*items, strict=True)
    return Pairs(list(indices), torch.stack(images), list(labels))
