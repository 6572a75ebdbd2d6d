"""Batches of tokens with depths for the head: of generated scenes, cached; of NYU, from random crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from evals.core.evaluator import EvalRun
from evals.core.features import Extraction, View, check_finite, extract, place
from radio.errors import DataError, SizeError
from radio.resources import check_memory, fast_products
from radio.types import Backbone

from .data import NYU_SIZE, SCENE_SIZE, DepthSplit, NyuCrops, NyuImages, Size, index_at

# Letters: B batch, D token width, H W grid, h w pixels of a depth map.

_TEST_BATCH = 32  # generated scenes; images of NYU are tested one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a head is trained."""

    iterations: int
    warmup: int  # steps of rising learning rate
    loss_warmup: int  # steps with the loss's mean term only
    batch_size: int
    lr: float
    weight_decay: float


class Feed(Protocol):
    """Where tokens and depths come from, on the run's device."""

    depth_size: Size  # of the test images

    def train_batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens [B, D, H, W] and depths [B, h, w] of each step from `first` on, alike on all ranks."""

    def test_batches(self) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
        """Yield this rank's test images: indices; tokens [B, D, H, W], and those of their mirror images where
        both are averaged; depths [B, h, w].
        """


@final
class SceneFeed:
    """Tokens and depths of generated scenes: seen in one way only, computed once, and kept in memory."""

    depth_size = SCENE_SIZE

    def __init__(
        self,
        model: Backbone,
        splits: Sequence[DepthSplit],
        training: Training,
        seed: int,
        size: Size,
        run: EvalRun,
    ) -> None:
        if size[0] != size[1]:
            raise SizeError(
                f"{model.name} takes {size[0]}x{size[1]} px only, and generated scenes are square"
            )
        check_memory(model, sum(map(len, splits)), size, torch.device("cpu"), torch.float32)
        view = View(kind="center", size=size, ratio=1.0, nearest_size=model.nearest_size)
        how = Extraction(
            view=view,
            device=run.device,
            dtype=run.dtype,
            head="map",
            project=lambda features: features.map(),
            batch=run.batch_size(64),
            workers=run.workers,
        )
        shared: dict[str, Any] = {"cache": run.cache, "group": run.ranks, "watch": run.progress}
        self._maps = [
            extract(model, split.images, how, damage=run.damage, **shared).features for split in splits
        ]
        self._depths = [torch.stack([split.read_depth(i) for i in range(len(split))]) for split in splits]
        self._training, self._seed, self._run = training, seed, run

    def train_batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of every step from `first` on."""
        maps, depths, device = self._maps[0], self._depths[0], self._run.device
        for step in range(first, self._training.iterations):
            start = step * self._training.batch_size
            rows = [
                index_at(position, len(maps), self._seed)
                for position in range(start, start + self._training.batch_size)
            ]
            yield maps[rows].to(device), depths[rows].to(device)

    def test_batches(self) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
        """Yield this rank's test images."""
        maps, depths, ranks, device = self._maps[1], self._depths[1], self._run.ranks, self._run.device
        own = list(range(ranks.rank, len(maps), ranks.world))
        for start in range(0, len(own), _TEST_BATCH):
            rows = own[start : start + _TEST_BATCH]
            yield rows, [maps[rows].to(device)], depths[rows].to(device)


@final
class NyuFeed:
    """Random crops of NYU for training, each rank's share encoded there; whole images for the test."""

    depth_size = NYU_SIZE

    def __init__(
        self,
        model: Backbone,
        splits: Sequence[DepthSplit],
        training: Training,
        seed: int,
        size: Size,
        run: EvalRun,
        *,
        whole: Size,
    ) -> None:
        check_memory(model, training.batch_size // run.ranks.world, size, run.device, run.dtype)
        check_memory(model, 2, whole, run.device, run.dtype)
        self._model, self._training, self._run = place(model, run.device, run.dtype), training, run
        self._crops = NyuCrops(splits[0], seed, size)
        self._images, self._num_images = NyuImages(splits[1], whole), len(splits[1])
        run.ranks.on_leader(lambda: _check_depths(splits[1], run))  # not after hours of training

    def train_batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of every step from `first` on: the ranks' shares side by side."""
        ranks, batch = self._run.ranks, self._training.batch_size
        share = batch // ranks.world
        starts = [step * batch + ranks.rank * share for step in range(first, self._training.iterations)]
        for images, depths in self._load(self._crops, [range(start, start + share) for start in starts]):
            parts = self._encode(images), depths
            # The head is small: every rank trains it on the whole batch, so that nothing depends on ranks.
            whole = (
                parts if ranks.world == 1 else tuple(ranks.gather(part.cpu()).flatten(0, 1) for part in parts)
            )
            yield whole[0].to(self._run.device), whole[1].to(self._run.device)

    def test_batches(self) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
        """Yield this rank's test images, each with its mirror image."""
        own = range(self._run.ranks.rank, self._num_images, self._run.ranks.world)
        for index, (images, depths) in zip(own, self._load(self._images, [[i] for i in own]), strict=True):
            maps = self._encode(torch.cat([images, images.flip(-1)]))
            check_finite(maps, self._model.name)
            yield [index], list(maps.split(1)), depths.to(self._run.device)

    def _load(
        self, data: NyuCrops | NyuImages, batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            _Caught(data),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self._run.workers,
            collate_fn=_collate,
            pin_memory=self._run.device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch[0], batch[1]

    def _encode(self, images: Tensor) -> Tensor:
        device = self._run.device
        with fast_products(device), torch.no_grad():
            return self._model(images.to(device, self._run.dtype, non_blocking=True)).map().float()


def _check_depths(split: DepthSplit, run: EvalRun) -> None:
    """Decode every depth map; raise DataError for one that cannot be used."""
    with run.progress(f"checking the depths of {split.images.name}", len(split)) as advance:
        for index in range(len(split)):
            split.read_depth(index)
            advance(1)


_Item = tuple[Tensor, Tensor] | DataError


@final
class _Caught(Dataset[_Item]):
    """Data set that returns its errors: raised in a loader's worker, they would come with a traceback."""

    def __init__(self, data: NyuCrops | NyuImages) -> None:
        self._data = data

    def __getitem__(self, index: int) -> _Item:
        try:
            return self._data[index]
        except DataError as error:
            return error


def _collate(items: list[_Item]) -> Any:
    """Stack the items of a batch, or return the first error among them."""
    error = next((item for item in items if isinstance(item, DataError)), None)
    return default_collate(items) if error is None else error
