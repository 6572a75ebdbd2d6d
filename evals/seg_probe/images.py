"""Data for MMSegmentation: images or cached tokens with labels, in a seeded order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

import cv2
import mmcv
import numpy as np
from mmcv.transforms import Compose, RandomFlip, RandomResize, Resize
from mmseg.datasets.transforms import PackSegInputs, PhotoMetricDistortion, RandomCrop
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from radio.types import Backbone

from .datasets import VOID, Labelling, Split
from .pixels import read_image, read_labels
from .plugin import FitResize
from .presets import ProbeConfig

# Letters: N images, D token width, H W grid.

Sample = dict[str, Any]  # MMSegmentation's {"inputs": Tensor, "data_samples": SegDataSample}

_META = ("img_path", "ori_shape", "img_shape", "place")


class Samples(Protocol):
    """N samples, by index."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, place: int) -> Sample:
        """Return the sample at an index."""


@final
class Images(Dataset[Sample]):
    """Images of a split, with MMSegmentation's transforms.

    Args:
        training: resize and crop labels along with the image; else they keep their original size.
    """

    def __init__(
        self, split: Split, labelling: Labelling, config: ProbeConfig, model: Backbone, *, training: bool
    ) -> None:
        self._split, self._labelling, self._training = split, labelling, training
        self._transforms = Compose(_transforms(config, model, training))
        self._pack = PackSegInputs(_META)
        self.metainfo = {"classes": labelling.classes}

    def __len__(self) -> int:
        return len(self._split.pairs)

    def __getitem__(self, place: int) -> Sample:
        pair = self._split.pairs[place]
        image = read_image(pair).numpy().transpose(1, 2, 0)
        results = {
            "img": np.ascontiguousarray(image[..., ::-1]),  # BGR, as the photometric distortion expects
            "img_path": str(pair.image),
            "img_shape": image.shape[:2],
            "ori_shape": image.shape[:2],
            "place": place,
            "seg_fields": ["gt_seg_map"],
        }
        labels = read_labels(pair.labels, self._labelling)
        if self._training:
            results["gt_seg_map"] = labels
        results = self._transforms(results)
        results.setdefault(
            "gt_seg_map", labels
        )  # when testing, after the transforms: the resize would change it
        sample: Sample = self._pack(results)
        return sample


@final
class TokenMaps(Dataset[Sample]):
    """The backbone's token maps of stretched images, with their labels."""

    def __init__(
        self, maps: Tensor, split: Split, labelling: Labelling, config: ProbeConfig, *, training: bool
    ) -> None:
        self._maps, self._split, self._labelling = maps, split, labelling  # [N, D, H, W]
        self._crop, self._training = config.crop, training
        self._pack = PackSegInputs(_META)
        self._labels: dict[int, NDArray[np.uint8]] = {}
        self.metainfo = {"classes": labelling.classes}

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, place: int) -> Sample:
        labels = self._read(place)
        results = {
            "img_path": str(self._split.pairs[place].image),
            "img_shape": self._crop,
            "ori_shape": labels.shape,
            "place": place,
            "gt_seg_map": labels,
        }
        return {**self._pack(results), "inputs": self._maps[place].float()}

    def _read(self, place: int) -> NDArray[np.uint8]:
        if place in self._labels:
            return self._labels[place]
        labels = read_labels(self._split.pairs[place].labels, self._labelling)
        if self._training and labels.shape != self._crop:
            height, width = self._crop
            labels = mmcv.imresize(labels, (width, height), interpolation="nearest")
        self._labels[place] = labels  # small beside the token map: a byte per pixel
        return labels


@final
class Stream(Dataset[Sample]):
    """An endless stream of samples: the sample at a position depends on the seed and the position only.

    Every N positions contain each image once. The transforms draw from numpy's and Python's global
    generators, which are seeded for each sample and then restored: workers, ranks and a restart change
    nothing.
    """

    def __init__(self, samples: Samples, seed: int, metainfo: dict[str, Any]) -> None:
        self._samples, self._seed, self.metainfo = samples, seed, metainfo
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def place(self, position: int) -> int:
        """Return the index in the data set of the sample at a position."""
        epoch, within = divmod(position, len(self._samples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._samples))
        return int(self._order[within])

    def __getitem__(self, position: int) -> Sample:
        with seeded(self._seed, position):
            return self._samples[self.place(position)]


@final
class Positions(Sampler[int]):
    """The positions in the stream of one rank: its share of every batch, in order."""

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        self._batch, self._share, self._rank, self._start = batch, batch // world, rank, 0
        self._length = -(-count // world)

    def __len__(self) -> int:
        """Return the size of this rank's share of the data set: the length of an epoch for mmengine."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        step = self._start
        while True:
            first = step * self._batch + self._rank * self._share
            yield from range(first, first + self._share)
            step += 1

    def skip(self, num_samples: int) -> None:
        """Skip this number of the rank's positions; mmengine's loop calls it to resume."""
        self._start = num_samples // self._share


@final
class Share(Sampler[int]):
    """Indices rank, rank + world, ...: each image is tested once."""

    def __init__(self, count: int, rank: int, world: int) -> None:
        self._places = range(rank, count, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def one_thread(worker: int) -> None:
    """Disable OpenCV's threads in a loader's worker: they compete with other workers or hang after a fork."""
    cv2.setNumThreads(0)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators with the entropy inside; restore them afterwards."""
    before, before_python = np.random.get_state(), random.getstate()  # noqa: NPY002 (what mmcv draws from)
    state = np.random.SeedSequence(entropy).generate_state(4)
    np.random.seed(state)  # noqa: NPY002
    random.seed(int(state[0]))
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
        random.setstate(before_python)


def _transforms(config: ProbeConfig, model: Backbone, training: bool) -> list[Any]:
    scale = (config.long_side, config.short_side)
    if config.resize == "stretch":
        height, width = config.crop
        return [Resize((width, height), keep_ratio=False)]
    if training:
        return [
            RandomResize(scale, ratio_range=(0.5, 2.0), keep_ratio=True),
            RandomCrop(config.crop, cat_max_ratio=0.75, ignore_index=VOID),
            RandomFlip(prob=0.5),
            PhotoMetricDistortion(),
        ]
    return [Resize(scale, keep_ratio=True) if config.slides else FitResize(model, *scale)]
