"""Cluster-balanced sampling against probabilities by hand, counted frequencies, and runs without it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from radio.errors import ConfigError, DataError
from train.checkpoints import resume_signature
from train.config import ClusterConfig, DataConfig, TrainConfig
from train.data import shards as shards_module
from train.data.clusters import balance, chance, parse_clusters
from train.data.streams import open_images, open_sources
from train.groups import make_partition

from ..conftest import fill_folder
from .conftest import follow, loader_of, settings

SIZES = {"a": 40, "b": 12, "c": 4}  # clusters of the 56 images of the seven shards


def cluster_of(index: int) -> str:
    """The cluster of an image of the shards, or of a folder of 56 images."""
    return "c" if index % 14 == 0 else "b" if index % 14 in (3, 7, 11) else "a"


def write(path: Path, clusters: Mapping[str, str]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    rows = "".join(f"{key}\t{cluster}\n" for key, cluster in clusters.items())
    path.write_text(f"key\tcluster\n{rows}", encoding="utf-8")


@pytest.fixture
def clusters(tmp_path: Path) -> Path:
    """A file for each of the seven shards, and for a folder `images` of as many images."""
    first = 0
    for number in range(7):
        keys = range(first, first + 5 + number)
        write(tmp_path / "clusters" / f"{number:03d}.tsv", {f"{key:05d}": cluster_of(key) for key in keys})
        first += 5 + number
    write(tmp_path / "clusters" / "images.tsv", {f"{key:03d}.png": cluster_of(key) for key in range(56)})
    assert Counter(map(cluster_of, range(56))) == SIZES
    return tmp_path / "clusters"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill_folder(tmp_path / "images", 56)


Make = Callable[[ClusterConfig], DataConfig]


@pytest.fixture(params=["shards", "images"])
def make(request: pytest.FixtureRequest) -> Make:
    """Data of 56 images, in shards or in a folder."""
    if request.param == "shards":
        pattern = request.getfixturevalue("shards")
        return lambda config: DataConfig(shards=(pattern,), clusters=config, num_streams=4)
    images = request.getfixturevalue("folder")
    return lambda config: DataConfig(images=(images,), clusters=config, num_streams=4)


def seen(config: TrainConfig, steps: int, **options: Any) -> list[str]:
    """The images of a run, in order."""
    rows = chain.from_iterable(follow(config, range(steps), **options))
    return [key for row in rows for key in row.keys]


def number(key: str) -> int:
    return int(Path(key).stem)


@pytest.mark.parametrize(
    ("config", "probabilities", "least", "met"),
    [
        (ClusterConfig(), {"a": 0.1, "b": 1 / 3, "c": 1.0}, 4, 56 / 12),
        (ClusterConfig(power=0.5), {"a": 0.1**0.5, "b": 3**-0.5, "c": 1.0}, 4, None),
        # 40 * m/40 + 12 * m/12 + 4 of 56 >= 1/2 for m = 12: the smallest integer with it
        (ClusterConfig(max_met=2), {"a": 0.3, "b": 1.0, "c": 1.0}, 12, 2.0),
        (ClusterConfig(max_met=1), {"a": 1.0, "b": 1.0, "c": 1.0}, 40, 1.0),
    ],
)
def test_probabilities_by_hand(
    config: ClusterConfig, probabilities: dict[str, float], least: int, met: float | None
) -> None:
    found = balance(SIZES, config)
    assert found.probabilities == pytest.approx(probabilities)
    assert found.least == least
    wanted = 56 / sum(SIZES[name] * p for name, p in probabilities.items())
    assert found.met == pytest.approx(wanted if met is None else met)
    assert found.met <= config.max_met


def test_chances_are_even_and_differ() -> None:
    drawn = torch.tensor([chance(5, position, index) for position in range(100) for index in range(50)])
    assert len(drawn.unique()) > 4990
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    for bin_count in torch.histc(drawn, 10, 0, 1).tolist():
        assert bin_count == pytest.approx(500, abs=90)  # four deviations
    assert chance(5, 1) != chance(6, 1)


def test_frequencies_are_those_of_balanced_clusters(make: Make, clusters: Path) -> None:
    config = settings(make(ClusterConfig(folder=clusters)))
    found = Counter(cluster_of(number(key)) for key in seen(config, 60))
    assert sum(found.values()) == 480
    for cluster in SIZES:  # a third each
        assert found[cluster] == pytest.approx(160, abs=40)
    plain = Counter(cluster_of(number(key)) for key in seen(settings(make(ClusterConfig())), 35))
    assert plain == pytest.approx({name: 5 * size for name, size in SIZES.items()}, abs=8)


def test_images_of_a_cluster_are_taken_alike(make: Make, clusters: Path) -> None:
    config = settings(make(ClusterConfig(folder=clusters)))
    found = Counter(number(key) for key in seen(config, 50) if cluster_of(number(key)) == "c")
    assert len(found) == 4
    assert max(found.values()) - min(found.values()) <= 12  # each is met and taken in every pass


def test_a_balanced_run_goes_on_from_anywhere(make: Make, clusters: Path) -> None:
    config = settings(make(ClusterConfig(folder=clusters)), 8, others=4)
    whole = list(follow(config, range(12)))
    for stop in (1, 5, 11):
        cursors = [rows.cursors for rows in whole[stop - 1]]
        rest = list(follow(config, range(stop, 12), cursors=cursors))
        for one, other in zip(chain(*rest), chain(*whole[stop:]), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.cursors, other.cursors)


def test_a_balanced_run_does_not_depend_on_ranks_and_workers(make: Make, clusters: Path) -> None:
    config = settings(make(ClusterConfig(folder=clusters)))
    whole = list(follow(config, range(6)))
    assert [row.keys for step in follow(config, range(6), workers=2) for row in step] == [
        row.keys for step in whole for row in step
    ]
    partition = make_partition(config, 2)
    ranks = [list(follow(config, range(6), partition=partition, rank=rank)) for rank in range(2)]
    for (row,), *parts in zip(whole, *ranks, strict=True):
        assert row.keys == tuple(chain.from_iterable(part[0].keys for part in parts))


def test_streams_that_share_a_shard(clusters: Path, shards: str) -> None:
    data = DataConfig(shards=(shards,), clusters=ClusterConfig(folder=clusters), num_streams=16)
    found = Counter(cluster_of(number(key)) for key in seen(settings(data, 16), 20))
    for cluster in SIZES:
        assert found[cluster] == pytest.approx(107, abs=35)


def test_images_that_are_not_taken_are_not_read(
    shards: str, clusters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    genuine = shards_module.open_shard

    def watched(name: str, position: int = 0) -> Any:
        tar = genuine(name, position)
        inner = tar.read
        tar.read = lambda member: (read.append(member.name), inner(member))[1]  # type: ignore[method-assign]
        return tar

    monkeypatch.setattr(shards_module, "open_shard", watched)
    keys = seen(settings(DataConfig(shards=(shards,), clusters=ClusterConfig(folder=clusters))), 5)
    assert sorted(read) == sorted(key.partition("/")[2] for key in keys)


def test_a_shard_of_which_nothing_is_taken_is_not_without_images(tmp_path: Path, shards: str) -> None:
    """One image in a hundred: whole passes go by without an image, and no error comes of it."""
    first = 0
    for each in range(7):
        keys = range(first, first + 5 + each)
        rows = {f"{key:05d}": "large" for key in keys}
        rows |= {f"none{each}-{index}": "large" for index in range(500)}
        write(tmp_path / f"{each:03d}.tsv", rows if each else {**rows, "last": "small"})
        first += 5 + each
    config = ClusterConfig(folder=tmp_path, max_met=1e6)
    keys = seen(settings(DataConfig(shards=(shards,), clusters=config, num_streams=1), 1), 1)
    assert len(keys) == 1


def test_weights_balance_every_source_by_itself(clusters: Path, shards: str, folder: Path) -> None:
    config = ClusterConfig(folder=clusters)
    data = DataConfig(shards=(shards,), images=(folder,), weights=(1, 1), clusters=config, num_streams=4)
    sources = open_sources(data)
    wanted = "3 clusters of 4 to 40 images: 4.67 images are met for each one that is taken"
    assert sources.notes == (wanted, wanted)
    capped = replace(data, clusters=replace(config, max_met=2))
    assert (
        open_sources(capped)
        .notes[0]
        .endswith("2 images are met for each one that is taken; those below 12 count as if they had 12")
    )


def test_the_run_says_what_balancing_costs(
    clusters: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(DataConfig(shards=(shards,), clusters=ClusterConfig(folder=clusters)))
    loader_of(config, make_partition(config, 1), 0, tmp_path)
    assert "3 clusters of 4 to 40 images: 4.67 images are met" in capsys.readouterr().out


def test_clusters_belong_to_what_a_resumed_run_must_have(make: Make, clusters: Path, tmp_path: Path) -> None:
    def signature(config: ClusterConfig) -> dict[str, Any]:
        run = settings(make(config))
        return resume_signature(run, {}, open_sources(run.data))

    own = signature(ClusterConfig(folder=clusters))
    moved = clusters.rename(tmp_path / "moved")
    assert signature(ClusterConfig(folder=moved)) == own
    assert signature(ClusterConfig(folder=moved, power=0.5)) != own
    assert signature(ClusterConfig())["images"] != own["images"]
    for name in ("000", "images"):
        path = moved / f"{name}.tsv"
        path.write_text(path.read_text().replace("\tc\n", "\td\n", 1))
        os.utime(path, (1, 1))
    assert signature(ClusterConfig(folder=moved))["images"] != own["images"]


def test_balancing_that_takes_every_image_is_a_plain_run(make: Make, clusters: Path) -> None:
    assert open_sources(make(ClusterConfig())).notes == ()
    plain = follow(settings(make(ClusterConfig())), range(20))
    every = follow(settings(make(ClusterConfig(folder=clusters, max_met=1))), range(20))
    for one, other in zip(chain(*plain), chain(*every), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.cursors, other.cursors)


def test_columns_in_any_order_beside_others(tmp_path: Path) -> None:
    path = tmp_path / "0.tsv"
    path.write_bytes("\ufeffurl\tcluster\tkey\r\nhttp://a\t7\t0001\r\n\tx y\té\r\n".encode())
    assert parse_clusters(path) == {"0001": "7", "é": "x y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"0\.tsv: an empty file; wanted a first line with key and cluster"),
        ("key\tcluster\n", "no line follows its first"),
        ("key,cluster\n1,2\n", r"its first line is 'key,cluster'; wanted"),
        ("name\tcluster\n1\t2\n", r"its first line is 'name\\tcluster'; wanted"),
        ("key\tcluster\n1\t2\n3\n", "line 3 is '3'; wanted a key and a cluster in 2 columns"),
        ("key\tcluster\n1\t\n", "line 2 is .* wanted a key and a cluster"),
        ("key\tcluster\n1\t2\n1\t3\n", "line 3 has the key 1 once more"),
    ],
)
def test_files_that_are_no_clusters(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "0.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        parse_clusters(path)


def test_bad_input_is_one_error(tmp_path: Path, shards: str, clusters: Path, folder: Path) -> None:
    balanced = ClusterConfig(folder=clusters)
    with pytest.raises(ConfigError, match=r"--data\.clusters\.power .* are for --data\.clusters\.folder"):
        open_sources(DataConfig(shards=(shards,), clusters=ClusterConfig(power=0.5)))
    with pytest.raises(
        ConfigError, match=r"teacher cache takes every image alike; leave --data\.clusters out"
    ):
        open_images(DataConfig(images=(folder,), clusters=balanced))
    with pytest.raises(DataError, match=r"two shards or folders have the name images"):
        open_sources(
            DataConfig(images=(folder, fill_folder(tmp_path / "b" / "images", 1)), clusters=balanced)
        )
    with pytest.raises(DataError, match=r"scenes\.tsv is not there, nor are 0 of the other 1"):
        open_sources(DataConfig(images=(folder,), scenes=3, clusters=balanced))
    write(clusters / "scenes.tsv", {"train/000000": "a", "train/000002": "b"})
    with pytest.raises(DataError, match=r"scenes\.tsv: has no line for the image train/000001; add its"):
        _ = open_sources(DataConfig(scenes=3, clusters=balanced)).notes
    (clusters / "003.tsv").unlink()
    with pytest.raises(DataError, match=r"003\.tsv is not there, nor are 0 of the other 6"):
        open_sources(DataConfig(shards=(shards,), clusters=balanced))
    write(clusters / "003.tsv", {"other": "a"})
    with pytest.raises(DataError, match=r"003\.tsv: has no line for the image 000\d\d; add its cluster"):
        seen(settings(DataConfig(shards=(shards,), clusters=balanced)), 7)
