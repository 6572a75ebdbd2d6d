"""What the loaders give to MMSegmentation: pictures or kept tokens with labels, in a seeded order."""

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
from .pixels import read_labels, read_picture
from .plugin import FitResize
from .presets import Plan

# Letters: N pictures, D token width, H W grid.

Sample = dict[str, Any]  # MMSegmentation's {"inputs": Tensor, "data_samples": SegDataSample}

_META = ("img_path", "ori_shape", "img_shape", "place")


class Samples(Protocol):
    """N samples, by place."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, place: int) -> Sample:
        """One sample."""


@final
class Pictures(Dataset[Sample]):
    """Pictures of a split, through MMSegmentation's transforms.

    Args:
        training: resize and crop labels along with the picture; else they keep their own size.
    """

    def __init__(
        self, split: Split, labelling: Labelling, plan: Plan, model: Backbone, *, training: bool
    ) -> None:
        self._split, self._labelling, self._training = split, labelling, training
        self._transforms = Compose(_transforms(plan, model, training))
        self._pack = PackSegInputs(_META)
        self.metainfo = {"classes": labelling.classes}

    def __len__(self) -> int:
        return len(self._split.pairs)

    def __getitem__(self, place: int) -> Sample:
        pair = self._split.pairs[place]
        image = read_picture(pair).numpy().transpose(1, 2, 0)
        results = {
            "img": np.ascontiguousarray(image[..., ::-1]),  # BGR, as the photometric distortion wants it
            "img_path": str(pair.picture),
            "img_shape": image.shape[:2],
            "ori_shape": image.shape[:2],
            "place": place,
            "seg_fields": ["gt_seg_map"],
        }
        labels = read_labels(pair.labels, self._labelling)
        if self._training:
            results["gt_seg_map"] = labels
        results = self._transforms(results)
        results.setdefault("gt_seg_map", labels)  # only now when testing: the resize would change it
        sample: Sample = self._pack(results)
        return sample


@final
class TokenMaps(Dataset[Sample]):
    """Maps that the backbone gave for stretched pictures, with the labels that belong to them."""

    def __init__(
        self, maps: Tensor, split: Split, labelling: Labelling, plan: Plan, *, training: bool
    ) -> None:
        self._maps, self._split, self._labelling = maps, split, labelling  # [N, D, H, W]
        self._crop, self._training = plan.crop, training
        self._pack = PackSegInputs(_META)
        self._labels: dict[int, NDArray[np.uint8]] = {}
        self.metainfo = {"classes": labelling.classes}

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, place: int) -> Sample:
        labels = self._read(place)
        results = {
            "img_path": str(self._split.pairs[place].picture),
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
        self._labels[place] = labels  # a byte a pixel, beside a token map of many
        return labels


@final
class Stream(Dataset[Sample]):
    """An endless row of samples: what stands at a position is decided by the seed and the position alone.

    Each run of N positions holds every picture once. The transforms draw from numpy's and Python's global
    generators, which are set for each sample and put back: workers, ranks and a restart change nothing.
    """

    def __init__(self, samples: Samples, seed: int, metainfo: dict[str, Any]) -> None:
        self._samples, self._seed, self.metainfo = samples, seed, metainfo
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def place(self, position: int) -> int:
        """The place in the data set of what stands at a position."""
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
    """The positions in the stream that one rank takes: its share of every batch, in order."""

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        self._batch, self._share, self._rank, self._start = batch, batch // world, rank, 0
        self._length = -(-count // world)

    def __len__(self) -> int:
        """This rank's share of the data set, once; mmengine asks for the length of an epoch."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        step = self._start
        while True:
            first = step * self._batch + self._rank * self._share
            yield from range(first, first + self._share)
            step += 1

    def skip(self, num_samples: int) -> None:
        """Begin after so many of this rank's positions; mmengine's loop calls it when it resumes."""
        self._start = num_samples // self._share


@final
class Share(Sampler[int]):
    """Places rank, rank + world, ...: each picture is tested once."""

    def __init__(self, count: int, rank: int, world: int) -> None:
        self._places = range(rank, count, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def one_thread(worker: int) -> None:
    """For a loader's worker: OpenCV's threads would fight with other workers', or hang after a fork."""
    cv2.setNumThreads(0)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """numpy's and Python's global generators, set by the entropy inside and as before outside."""
    before, before_python = np.random.get_state(), random.getstate()  # noqa: NPY002 (what mmcv draws from)
    state = np.random.SeedSequence(entropy).generate_state(4)
    np.random.seed(state)  # noqa: NPY002
    random.seed(int(state[0]))
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
        random.setstate(before_python)


def _transforms(plan: Plan, model: Backbone, training: bool) -> list[Any]:
    scale = (plan.long_side, plan.short_side)
    if plan.resize == "stretch":
        height, width = plan.crop
        return [Resize((width, height), keep_ratio=False)]
    if training:
        return [
            RandomResize(scale, ratio_range=(0.5, 2.0), keep_ratio=True),
            RandomCrop(plan.crop, cat_max_ratio=0.75, ignore_index=VOID),
            RandomFlip(prob=0.5),
            PhotoMetricDistortion(),
        ]
    return [Resize(scale, keep_ratio=True) if plan.slides else FitResize(model, *scale)]
