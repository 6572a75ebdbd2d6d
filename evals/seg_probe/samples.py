"""Samples for MMSegmentation: images or cached token maps with labels, in a seeded order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose, RandomFlip, RandomResize, Resize
from mmseg.datasets.transforms import PackSegInputs, PhotoMetricDistortion, RandomCrop
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from evals.core.evaluator import EvalRun
from radio.chunks import (
    Tensors,
    TensorSpec,
    cached_chunks,
    chunk_path,
    load_tensors,
    read_tensors,
    write_tensors,
)
from radio.errors import RadioError
from radio.resources import fast_products
from radio.types import Backbone

from .data import VOID, Labelling, Split, read_image, read_labels
from .plugin import FitResize
from .protocol import ProbeConfig, Size

# Letters: N images, B batch, D token width, H W grid.

Sample = dict[str, Any]  # MMSegmentation's {"inputs": Tensor, "data_samples": SegDataSample}

_META = ("img_path", "ori_shape", "img_shape", "index")


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

    def __getitem__(self, index: int) -> Sample:
        pair = self._split.pairs[index]
        image = read_image(pair).numpy().transpose(1, 2, 0)
        results = {
            "img": np.ascontiguousarray(image[..., ::-1]),  # BGR, as the photometric distortion expects
            "img_path": str(pair.image),
            "img_shape": image.shape[:2],
            "ori_shape": image.shape[:2],
            "index": index,
            "seg_fields": ["gt_seg_map"],
        }
        labels = read_labels(pair.labels, self._labelling)
        if self._training:
            results["gt_seg_map"] = labels
        results = self._transforms(results)
        results.setdefault("gt_seg_map", labels)  # when testing, only now: the resize would change it
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

    def __getitem__(self, index: int) -> Sample:
        labels = self._read(index)
        results = {
            "img_path": str(self._split.pairs[index].image),
            "img_shape": self._crop,
            "ori_shape": labels.shape,
            "index": index,
            "gt_seg_map": labels,
        }
        return {**self._pack(results), "inputs": self._maps[index].float()}

    def _read(self, index: int) -> NDArray[np.uint8]:
        if index not in self._labels:  # kept: small beside the token map, a byte per pixel
            labels = read_labels(self._split.pairs[index].labels, self._labelling)
            if self._training and labels.shape != self._crop:
                labels = mmcv.imresize(labels, self._crop[::-1], interpolation="nearest")
            self._labels[index] = labels
        return self._labels[index]


@final
class Stream(Dataset[Sample]):
    """An endless stream of samples: the sample at a position depends on the seed and the position only.

    Every N positions contain each image once. The transforms draw from numpy's and Python's global
    generators, which are seeded for each sample and then restored: workers, ranks and a restart change
    nothing.
    """

    def __init__(self, samples: Images | TokenMaps, seed: int, metainfo: dict[str, Any]) -> None:
        self._samples, self._seed, self.metainfo = samples, seed, metainfo
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def index_at(self, position: int) -> int:
        """Return the index in the data set of the sample at a position."""
        epoch, within = divmod(position, len(self._samples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._samples))
        return int(self._order[within])

    def __getitem__(self, position: int) -> Sample:
        with seeded(self._seed, position):
            return self._samples[self.index_at(position)]


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


def one_thread(worker: int) -> None:
    """Disable OpenCV's threads in a loader's worker: they compete with other workers or hang after a fork."""
    cv2.setNumThreads(0)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators with the entropy inside; restore them afterwards."""
    state = np.random.SeedSequence(entropy).generate_state(4)
    with restored_generators():
        np.random.seed(state)  # noqa: NPY002 (what mmcv draws from)
        random.seed(int(state[0]))
        yield


@contextmanager
def restored_generators() -> Iterator[None]:
    """Restore numpy's and Python's global generators afterwards."""
    before, before_python = np.random.get_state(), random.getstate()  # noqa: NPY002
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


_BATCH = 32  # images per forward pass
CHUNK = 128  # images per file: the most that an interrupted run loses
_FORMAT = f"token maps/1 float16 in chunks of {CHUNK}"


def map_size(model: Backbone, crop: Size, run: EvalRun) -> int:
    """Compute the bytes of an image's cached map, from one forward pass of a grey image."""
    grey = torch.full((1, 3, *crop), 0.5, device=run.device, dtype=run.dtype)
    with torch.no_grad():
        return 2 * model(grey).tokens.numel()


def token_maps(model: Backbone, images: Images, run: EvalRun, *, key: Sequence[object], label: str) -> Tensor:
    """Compute or load from the cache the maps of stretched images: [N, D, H, W] float16 on the CPU.

    Args:
        key: everything that determines the maps.
        label: of the progress bar.

    Raises:
        DataError: ranks do not share the cache folder.
        RadioError: tokens that are not finite in float16.
    """
    folder = run.cache / "token-maps" / hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()
    spans = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    batch_size = run.batch_size(_BATCH)

    def read(path: Path) -> Tensors:
        count = len(spans[int(path.stem)])
        return read_tensors(path, {"maps": TensorSpec(torch.float16, (count, model.token_dim, None, None))})

    def make(missing: list[int]) -> None:
        with run.progress(label, sum(len(spans[number]) for number in missing)) as advance:
            for number in missing:
                loader: DataLoader[Any] = DataLoader(
                    Subset(images, spans[number]),
                    batch_size=batch_size,
                    num_workers=run.workers,
                    collate_fn=_stack,
                    worker_init_fn=one_thread,
                    pin_memory=run.device.type == "cuda",
                )
                parts = []
                for pixels in loader:
                    parts.append(_encode(model, pixels.to(run.device, non_blocking=True), run.dtype))
                    advance(len(pixels))
                write_tensors(chunk_path(folder, number), {"maps": torch.cat(parts)})

    paths = cached_chunks(folder, len(spans), read=read, make=make, ranks=run.ranks, damage=run.damage)
    return torch.cat([load_tensors(path, ["maps"]).tensors["maps"] for path in paths])


def _encode(model: Backbone, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Encode BGR bytes [B, 3, h, w] as maps [B, D, H, W]."""
    with fast_products(images.device), torch.no_grad():
        maps = model((images[:, [2, 1, 0]].float() / 255).to(dtype)).map().half().cpu()
    if not bool(torch.isfinite(maps).all()):
        raise RadioError(
            f"{model.name} gives tokens that are not finite in half precision; try --precision fp32 with "
            f"--no-keep-tokens, or look at the training"
        )
    return maps.contiguous()


def _stack(samples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([sample["inputs"] for sample in samples])
