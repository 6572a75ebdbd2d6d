"""The teacher cache holds what the teachers give, is resumed exactly, and says its size first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from radio.errors import DataError, RadioError
from radio.types import Teacher
from train import cache as module
from train.assembly import load_teachers, teacher_sizes
from train.cache import FeatureCache, cache_key, write_cache
from train.config import DataConfig, TrainConfig
from train.crops import FixedCrops, RandomCrops
from train.pictures import open_pictures
from train.sampling import picture_at
from train.step import teacher_features

from .conftest import CPU, TEACHERS, Start, fill_folder, losses_of, read_records

SIDE = 108


class Job(NamedTuple):
    """What a cache is written from."""

    teachers: dict[str, Teacher]
    sizes: dict[str, tuple[int, int]]
    crops: FixedCrops


def make(config: TrainConfig, *, count: int = 10, crops: int = 2, seed: int = 0) -> Job:
    teachers = load_teachers(config, CPU)
    source = RandomCrops(open_pictures(config.data), config.data, SIDE, seed)
    return Job(teachers, teacher_sizes(config, teachers), FixedCrops(source, count, crops))


def write(
    root: Path,
    job: Job,
    *,
    workers: int = 0,
    confirm: Callable[[int], None] = lambda size: None,
    progress: Callable[[int], None] = lambda done: None,
) -> FeatureCache:
    return write_cache(root, *job, 0, device=CPU, workers=workers, confirm=confirm, progress=progress)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 8)


def arrays(cache: FeatureCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.folder.glob("*.npy"))}


def test_rows_are_the_teachers_features_of_the_crops(config: TrainConfig, tmp_path: Path) -> None:
    job = make(config)
    cache = write(tmp_path, job)
    assert cache.count == len(job.crops) == 20
    for position in (0, 7, 19, 20, 41):
        row = cache[position]
        entry = picture_at(position, 20, 0)
        crop = job.crops[entry].pixels
        assert torch.equal(row.pixels, crop)
        direct = teacher_features(job.teachers, job.sizes, crop[None].float() / 255)
        targets = cache.targets(
            {name: value[None] for name, value in row.summaries.items()},
            {name: value[None] for name, value in row.tokens.items()},
            CPU,
        )
        for name, wanted in direct.items():
            assert targets[name].grid == wanted.grid
            assert targets[name].tokens.dtype == torch.float32
            assert torch.allclose(targets[name].tokens, wanted.tokens, atol=1e-3)
            assert torch.allclose(targets[name].summary, wanted.summary, atol=1e-3)


def test_the_stream_shuffles_every_epoch(config: TrainConfig, tmp_path: Path) -> None:
    job = make(config, count=5, crops=1)
    cache = write(tmp_path, job)
    whole = {job.crops[entry].pixels.numpy().tobytes() for entry in range(5)}
    epochs = [[cache[5 * epoch + place].pixels.numpy().tobytes() for place in range(5)] for epoch in range(4)]
    assert all(set(epoch) == whole for epoch in epochs)
    assert any(epoch != epochs[0] for epoch in epochs)


class StoppedError(Exception):
    """What a kill is here."""


@pytest.mark.parametrize("workers", [0, 1])
def test_writing_goes_on_where_it_was_stopped(config: TrainConfig, tmp_path: Path, workers: int) -> None:
    job = make(config)
    undisturbed = write(tmp_path / "one", job)

    def stop(done: int) -> None:
        if done >= 16:
            raise StoppedError

    with pytest.raises(StoppedError):
        write(tmp_path / "two", job, progress=stop)
    seen: list[int] = []
    asked: list[int] = []
    resumed = write(tmp_path / "two", job, workers=workers, progress=seen.append, confirm=asked.append)
    assert seen == [20]  # the first 16 were not computed again
    assert asked == []
    assert arrays(resumed) == arrays(undisturbed)


def test_a_whole_cache_is_only_opened(config: TrainConfig, tmp_path: Path) -> None:
    job = make(config)
    first = write(tmp_path, job)

    def never(number: int) -> None:
        raise AssertionError("nothing is to be written")

    again = write(tmp_path, job, confirm=never, progress=never)
    assert again.folder == first.folder
    assert torch.equal(again[3].pixels, first[3].pixels)


def test_the_key_follows_weights_transform_and_data(config: TrainConfig, tmp_path: Path) -> None:
    def key(config: TrainConfig, seed: int = 0, **counts: int) -> str:
        job = make(config, seed=seed, **counts)
        return cache_key(job.teachers, job.sizes, job.crops, seed)

    weights = (replace(TEACHERS[0], model="tiny:clip2"), *TEACHERS[1:])
    resolution = (replace(TEACHERS[0], resolution=60), *TEACHERS[1:])
    other = fill_folder(tmp_path / "other", 23)
    same = fill_folder(tmp_path / "same", 24)
    base = key(config)
    assert key(replace(config, data=replace(config.data, images=(same,)))) == base
    assert key(replace(config, optim=replace(config.optim, lr=1.0), steps=99, batch_size=2)) == base
    changed = [
        key(replace(config, teachers=weights)),
        key(replace(config, teachers=resolution)),
        key(replace(config, teachers=TEACHERS[:2])),
        key(replace(config, data=replace(config.data, images=(other,)))),
        key(replace(config, data=replace(config.data, crop_scale=(0.5, 1.0)))),
        key(replace(config, data=replace(config.data, crop_aspect=(1.0, 1.0)))),
        key(replace(config, data=replace(config.data, flip=0.0))),
        key(config, count=9),
        key(config, crops=3),
        key(config, seed=1),
    ]
    assert len({base, *changed}) == 1 + len(changed)


def test_the_size_is_told_first_and_exact(config: TrainConfig, tmp_path: Path) -> None:
    told: list[int] = []

    def confirm(size: int) -> None:
        assert not list(tmp_path.rglob("*.npy"))
        told.append(size)

    cache = write(tmp_path, make(config), confirm=confirm)
    files = list(cache.folder.glob("*.npy"))
    assert len(files) == 7
    assert told == [sum(np.load(path, mmap_mode="r").nbytes for path in files)]
    headers = 128 * len(files)
    assert told == [sum(path.stat().st_size for path in files) - headers]


def test_a_refusal_leaves_nothing(config: TrainConfig, tmp_path: Path) -> None:
    def refuse(size: int) -> None:
        raise RadioError("not written")

    with pytest.raises(RadioError, match="not written"):
        write(tmp_path / "caches", make(config), confirm=refuse)
    assert not (tmp_path / "caches").exists()


def test_a_full_disk_is_told_before_writing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RadioError, match=r"GB does not fit, 0\.0 GB are free; take fewer pictures or crops"):
        write(tmp_path, make(config))
    assert not list(tmp_path.rglob("*.npy"))


def test_features_beyond_half_precision_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    huge = replace(config, teachers=(replace(TEACHERS[1], model="tiny:huge"),))
    with pytest.raises(RadioError, match="teacher dense gives features beyond half precision"):
        write(tmp_path, make(huge))


def test_too_many_broken_pictures_stop_the_writing(config: TrainConfig, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 4, broken=12)
    mixed = replace(config, data=DataConfig(images=(folder,), workers=0))
    with pytest.raises(DataError, match="pictures cannot be read; mend the data"):
        write(tmp_path / "caches", make(mixed, count=16))


def test_training_from_the_cache_is_training_online(
    config: TrainConfig, tmp_path: Path, start: Start
) -> None:
    """The cached crops are others than those online, so targets are compared batch by batch."""
    cached = start(config, cache=replace(config.cache, folder=tmp_path / "caches"), out=tmp_path / "cached")
    assert cached.cache is not None
    for batch, _ in zip(cached.batches(), range(2), strict=False):
        (lesson,) = batch.lessons
        direct = teacher_features(cached.teachers, cached.sizes, lesson.images)
        for name, wanted in direct.items():
            assert torch.allclose(lesson.targets[name].tokens, wanted.tokens, atol=1e-3)
            assert torch.allclose(lesson.targets[name].summary, wanted.summary, atol=1e-3)
    cached.train()
    losses = losses_of(tmp_path / "cached")
    assert losses[-1] < losses[0]
    assert read_records(tmp_path / "cached")[-1]["broken"] == 0


def test_a_cached_run_repeats_bit_for_bit(config: TrainConfig, tmp_path: Path, start: Start) -> None:
    options = replace(config.cache, folder=tmp_path / "caches", pictures=10, crops=2)
    for name, workers in (("a", 0), ("b", 2)):
        data = replace(config.data, workers=workers)
        start(config, cache=options, out=tmp_path / name, data=data, steps=6).train()
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert len(list((tmp_path / "caches").iterdir())) == 1


def test_a_large_cache_needs_consent(
    config: TrainConfig, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.np, "prod", lambda shape: 10**9)  # as if every array were huge
    options = replace(config.cache, folder=tmp_path / "caches")
    with pytest.raises(RadioError, match=r"GB would be written; agree with --cache\.no-confirm"):
        start(config, cache=options)
    assert not (tmp_path / "caches").exists()
    with pytest.raises(RadioError, match="does not fit"):
        start(config, cache=replace(options, confirm=False))
