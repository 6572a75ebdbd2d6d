"""Samples in a seeded order, and cached token maps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader

from evals.core.evaluator import EvalRun, RunSettings
from evals.seg_probe.data import Dataset
from evals.seg_probe.layouts import open_dataset
from evals.seg_probe.protocol import SegSettings, resolve
from radio.chunks import Damage
from radio.dist import Ranks
from radio.errors import DataError, RadioError

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def data(tmp_path: Path, make_ade: Callable) -> Dataset:
    return open_dataset(make_ade(tmp_path / "mine"), voc_split=None, known={"ADE20K": [], "VOC2012": []})


def images(data: Dataset, model, training: bool, **changes):
    from evals.seg_probe.plugin import Images

    plan, _ = resolve(replace(SegSettings(data=Path("x"), crop=56), **changes), model)
    return Images(data.train, data.labelling, plan, model, training=training)


def row(samples, first: int, count: int, workers: int = 0) -> list[torch.Tensor]:
    from evals.seg_probe.training import Stream

    stream = Stream(samples, 7, {})
    loader = DataLoader(stream, sampler=range(first, first + count), num_workers=workers, collate_fn=list)
    return [batch[0]["inputs"] for batch in loader]


def test_a_position_decides_its_sample_whatever_came_before(data: Dataset, backbone: Callable) -> None:
    samples = images(data, backbone(), training=True)
    whole = row(samples, 0, 12)
    for one, other in zip(whole[5:], row(samples, 5, 7), strict=True):
        assert torch.equal(one, other)
    assert {tuple(one.shape) for one in whole} <= {(3, h, w) for h in range(1, 57) for w in range(1, 57)}


def test_workers_change_nothing(data: Dataset, backbone: Callable) -> None:
    samples = images(data, backbone(), training=True)
    for one, other in zip(row(samples, 0, 6), row(samples, 0, 6, workers=2), strict=True):
        assert torch.equal(one, other)


def test_every_epoch_holds_every_image_once_in_another_order() -> None:
    from evals.seg_probe.training import Stream

    stream = Stream(range(10), 3, {})
    epochs = [[stream.index_at(10 * epoch + n) for n in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [Stream(range(10), 4, {}).index_at(n) for n in range(10)] != epochs[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_batches_of_one(world: int) -> None:
    from evals.seg_probe.training import Positions

    shares = [list(islice(Positions(20, 6, rank, world), 30 // world)) for rank in range(world)]
    size = 6 // world
    batches = [[p for share in shares for p in share[step * size : (step + 1) * size]] for step in range(5)]
    assert batches == [list(range(6 * step, 6 * step + 6)) for step in range(5)]


def test_skipping_goes_on_at_the_exact_position() -> None:
    from evals.seg_probe.training import Positions

    positions = Positions(20, 6, 1, 2)
    whole = list(islice(positions, 30))
    positions.skip(4 * 3)  # as mmengine asks: iterations times this rank's batch
    assert list(islice(positions, 18)) == whole[12:]
    assert len(positions) == 10


def test_global_generators_are_left_as_they_were() -> None:
    from evals.seg_probe.training import seeded

    def draw() -> tuple[float, float]:
        return np.random.rand(), random.random()  # noqa: NPY002 (mmcv's transforms draw from these)

    with seeded(5):
        first = draw()
        with seeded(1, 2):
            one = draw()
        with seeded(1, 3):
            other = draw()
        with seeded(1, 2):
            assert draw() == one != other
        second = draw()
    with seeded(5):
        assert (draw(), draw()) == (first, second)


def test_tested_images_keep_their_labels_size(data: Dataset, backbone: Callable) -> None:
    sample = images(data, backbone(), training=False)[0]
    meta = sample["data_samples"].metainfo
    assert sample["inputs"].shape == (3, 56, 78)
    assert (meta["ori_shape"], meta["img_shape"], meta["index"]) == ((40, 56), (56, 78), 0)
    assert sample["data_samples"].gt_sem_seg.data.shape == (1, 40, 56)


def test_labels_and_image_are_transformed_together(data: Dataset, backbone: Callable) -> None:
    """The stripes' colours tell the label of a pixel, wherever resize, crop and flip put it."""
    samples = images(data, backbone(), training=True)
    hits = []
    for sample in (samples[place] for place in range(8)):
        labels = sample["data_samples"].gt_sem_seg.data[0]
        blue, green, red = sample["inputs"].float()
        told = torch.stack([red, green, blue]).argmax(0)
        known = labels != 255
        hits.append(float((told == labels)[known].float().mean()))
    assert np.mean(hits) > 0.8  # the photometric distortion turns some hues


def test_stretched_images_are_squares_in_training_and_testing(data: Dataset, backbone: Callable) -> None:
    for training, labels in ((True, (1, 56, 56)), (False, (1, 40, 56))):
        sample = images(data, backbone(), training=training, preset="scenes")[0]
        assert sample["inputs"].shape == (3, 56, 56)
        assert sample["data_samples"].gt_sem_seg.data.shape == labels


def test_kept_tokens_come_with_the_labels_of_images(data: Dataset, backbone: Callable) -> None:
    from evals.seg_probe.plugin import TokenMaps

    plan, _ = resolve(SegSettings(data=Path("x"), crop=56, preset="scenes"), backbone())
    maps = torch.randn(8, 6, 4, 4).half()
    for training in (True, False):
        kept = TokenMaps(maps, data.train, data.labelling, plan, training=training)
        seen = images(data, backbone(), training=training, preset="scenes")
        assert len(kept) == len(seen) == 8
        for place in (0, 1, 0):
            assert torch.equal(kept[place]["inputs"], maps[place].float())
            one, other = kept[place]["data_samples"], seen[place]["data_samples"]
            assert torch.equal(one.gt_sem_seg.data, other.gt_sem_seg.data)
            assert training or one.metainfo == other.metainfo


@pytest.fixture
def maps_of(tmp_path: Path, make_ade: Callable, monkeypatch) -> Callable[..., torch.Tensor]:
    from evals.seg_probe import plugin as parts
    from evals.seg_probe.plugin import Images

    monkeypatch.setattr(parts, "CHUNK", 3)
    root = make_ade(tmp_path / "mine")
    data = open_dataset(root, voc_split=None, known={"ADE20K": [], "VOC2012": []})

    def make(
        model: Any, group: Ranks | None = None, key: str = "key", damage: Damage | None = None
    ) -> torch.Tensor:
        plan, _ = resolve(SegSettings(data=root, preset="scenes"), model)
        images = Images(data.train, data.labelling, plan, model, training=True)
        shared = RunSettings(cache=tmp_path / "cache", device="cpu", batch_size=2, workers=0)
        run = EvalRun(shared, base="seg", folder=tmp_path / "out", ranks=group)
        run.damage = damage or run.damage
        return parts.token_maps(model, images, run, key=[key], label="tokens")

    return make


def test_maps_are_the_backbones_own_computed_once(maps_of: Callable, backbone: Callable) -> None:
    model = backbone()
    maps = maps_of(model)
    assert (maps.shape, maps.dtype) == ((8, 6, 7, 7), torch.float16)
    assert len(model.sizes) == 8
    assert torch.equal(maps_of(model), maps)
    assert len(model.sizes) == 8
    maps_of(model, key="other")
    assert len(model.sizes) == 16


def test_a_killed_run_goes_on_with_the_chunk_that_is_missing(maps_of: Callable, backbone: Callable) -> None:
    model = backbone()
    model.fail_after = 5
    with pytest.raises(KeyboardInterrupt):
        maps_of(model)
    again = backbone()
    maps = maps_of(again)
    assert len(again.sizes) == 5  # the second and the third chunk
    assert torch.equal(maps, maps_of(backbone(), key="whole"))


def other_keys(data: bytes) -> bytes:
    return safetensors.torch.save({"other": torch.zeros(3)})


def other_numbers(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 64])


def other_shape(data: bytes) -> bytes:
    return safetensors.torch.save({"maps": torch.zeros(3, 6, 7, 8, dtype=torch.float16)})


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:40], lambda data: b"", other_keys, other_numbers, other_shape]
)
def test_a_damaged_chunk_is_made_again_and_said(
    tmp_path: Path, maps_of: Callable, backbone: Callable, spoil: Callable
) -> None:
    maps = maps_of(backbone())
    path = next((tmp_path / "cache").rglob("000001.safetensors"))
    path.write_bytes(spoil(path.read_bytes()))
    model, damage = backbone(), Damage()
    assert torch.equal(maps_of(model, damage=damage), maps)
    assert len(model.sizes) == 3
    assert "1 damaged file of the cache was made again" in damage.notes()[0]


class _Alone(Ranks):
    """The first of two ranks, whose other never writes."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def test_ranks_take_turns_and_notice_a_folder_that_is_not_shared(
    maps_of: Callable, backbone: Callable
) -> None:
    model = backbone()
    with pytest.raises(DataError, match="what other ranks made is not here; give --cache a folder"):
        maps_of(model, _Alone(0, 2))
    assert len(model.sizes) == 5  # chunks 0 and 2 of 3 + 3 + 2
    other = backbone()
    assert torch.equal(maps_of(other, _Alone(1, 2)), maps_of(backbone(), key="whole"))
    assert len(other.sizes) == 3


def test_tokens_beyond_half_precision_are_an_error(maps_of: Callable, backbone: Callable) -> None:
    class Loud(type(backbone())):
        def __call__(self, images):
            features = super().__call__(images)
            return features._replace(tokens=features.tokens * 1e6)

    with pytest.raises(RadioError, match=r"not finite in half precision.*--no-keep-tokens"):
        maps_of(Loud())
