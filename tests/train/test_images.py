"""Folders, shards and scenes counted through as one set of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from radio.errors import ConfigError, DataError
from radio.scenes import render_domain, render_images
from train.config import DataConfig
from train.data.streams import open_images

from .conftest import fill_folder, fill_shard, image_bytes


def test_parts_follow_one_another(tmp_path: Path) -> None:
    fill_shard(tmp_path / "p-0.tar", 10, 2)
    fill_shard(tmp_path / "p-1.tar", 20, 3)
    folder = fill_folder(tmp_path / "folder", 4)
    data = DataConfig(shards=(str(tmp_path / "p-{0..1}.tar"),), images=(folder,), scenes=5, scenes_seed=7)
    images = open_images(data)
    assert len(images) == 2 + 3 + 4 + 5
    files = [image_bytes(seed, "JPEG") for seed in (10, 11, 20, 21, 22)]
    files += [image_bytes(seed) for seed in range(4)]
    assert [images.load(index) for index in range(9)] == files
    for index, wanted in enumerate(render_images(list(range(5)), split="train", seed=7, size=96)[0], 9):
        scene = images.load(index)
        assert isinstance(scene, torch.Tensor)
        assert torch.equal(scene, torch.from_numpy(wanted))
    with pytest.raises(IndexError):
        images.load(14)


def test_the_card_names_every_part_and_that_labels_were_left_alone(tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "folder", 3)
    sources = open_images(DataConfig(images=(folder,), scenes=2)).sources
    assert [(source["path"], source["count"]) for source in sources] == [
        (str(folder), 3),
        ("scenes:train?seed=2", 2),
    ]
    assert all(source["labels_used"] is False and len(source["fingerprint"]) == 64 for source in sources)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "a", 3)
    same = fill_folder(tmp_path / "b", 3)
    prints = [open_images(DataConfig(images=(path,))).fingerprint for path in (folder, same)]
    assert prints[0] == prints[1]
    (same / "001.png").write_bytes(image_bytes(99))
    assert open_images(DataConfig(images=(same,))).fingerprint != prints[0]
    assert open_images(DataConfig(images=(folder,), scenes=1)).fingerprint != prints[0]


def test_scenes_of_another_domain_are_other_data() -> None:
    own, web = (open_images(DataConfig(scenes=4, scenes_domain=domain)) for domain in ("own", "web"))
    assert own.fingerprint == open_images(DataConfig(scenes=4)).fingerprint != web.fingerprint
    assert [source["path"] for source in web.sources] == ["scenes:train?seed=2&domain=web"]
    for index in range(4):
        scene = web.load(index)
        assert isinstance(scene, torch.Tensor)
        assert torch.equal(scene, torch.from_numpy(render_domain(index, domain="web", seed=2)))


def test_bad_sources_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data: give --data\.shards .*--data\.images FOLDER"):
        open_images(DataConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no images"):
        open_images(DataConfig(images=(tmp_path / "empty",)))
    with pytest.raises(DataError, match="no such folder"):
        open_images(DataConfig(images=(tmp_path / "absent",)))
    with pytest.raises(DataError, match=r"absent\.tar: no such shard"):
        open_images(DataConfig(shards=(str(tmp_path / "absent.tar"),)))
    (tmp_path / "bad.tar").write_text("this is no tar file")
    with pytest.raises(DataError, match="not a plain tar file, or a damaged one"):
        open_images(DataConfig(shards=(str(tmp_path / "bad.tar"),)))
    with pytest.raises(DataError, match="give a count of 1 to"):
        open_images(DataConfig(scenes=-1))
    with pytest.raises(ConfigError, match=r"scenes-domain night has no effect without --data\.scenes"):
        open_images(DataConfig(scenes_domain="night"))
