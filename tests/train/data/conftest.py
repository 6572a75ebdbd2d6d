"""Small shards made by hand, and a run over them without a trainer."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from radio.dist import Ranks
from train.config import DataConfig, TeacherConfig, TrainConfig
from train.data.loader import Loader, Rows, Share, open_stream, share_evenly
from train.data.streams import assign_streams, open_sources
from train.groups import Partition, make_partition

from ..conftest import CPU, image_bytes

SIDE = 16


def pack(path: Path, files: Sequence[tuple[str, bytes]], **options: object) -> Path:
    """A tar file of these names and bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pack_images(path: Path, first: int, count: int) -> Path:
    """A shard of small images with a caption each, numbered through from `first`."""
    files = []
    for index in range(first, first + count):
        files += [
            (f"{index:05d}.jpg", image_bytes(index, "JPEG", (20, 24))),
            (f"{index:05d}.txt", b"a caption"),
        ]
    return pack(path, files)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven shards of 5, 6, 7, ... images: the pattern that names them."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for number in range(7):
        pack_images(folder / f"{number:03d}.tar", first, 5 + number)
        first += 5 + number
    return f"{folder}/{{000..006}}.tar"


def settings(data: DataConfig, batch_size: int = 8, others: int | None = None) -> TrainConfig:
    """A run of one group, or of a second one with a batch of its own."""
    teachers = [TeacherConfig(name="a", model="tiny:clip")]
    if others is not None:
        teachers.append(TeacherConfig(name="b", model="tiny:sam", batch_size=others))
    return TrainConfig(
        recipe="test",
        student="vit-tiny12",
        teachers=tuple(teachers),
        resolution=SIDE,
        steps=100,
        batch_size=batch_size,
        out=Path("unused"),
        data=replace(data, workers=0),
    )


def loader_of(config: TrainConfig, partition: Partition, rank: int, out: Path) -> Loader:
    """The loader of one of a run's ranks, as if it were alone."""
    config = replace(config, out=out)
    sides = [dict.fromkeys(group.sides, SIDE) for group in partition.groups]
    return Loader(config, partition, Ranks(rank), open_sources(config.data), sides, CPU, print)


Follow = Callable[..., Iterator[tuple[Rows, ...]]]


def follow(
    config: TrainConfig,
    steps: range,
    *,
    partition: Partition | None = None,
    rank: int = 0,
    workers: int = 0,
    cursors: Sequence[Tensor] | None = None,
    pin: bool = False,
) -> Iterator[tuple[Rows, ...]]:
    """The rows that a rank of a run sees, from cursors of whole groups on."""
    partition = partition or make_partition(config, 1)
    sources = open_sources(config.data)
    shares = []
    for number, each in enumerate(assign_streams(config, partition)):
        if streams := each.local(partition, rank):
            start = each.zeros(len(sources)) if cursors is None else cursors[number]
            group = partition.groups[number]
            sides = dict.fromkeys(group.sides, SIDE)
            shares.append(Share(each, streams, group, sides, start[streams.start : streams.stop]))
    workers = share_evenly(workers, [len(share.streams) for share in shares])
    return open_stream(sources, shares, config.data, config.seed, steps, workers, pin=pin)
