"""Images and settings for runs that take a fraction of a second."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from radio import checkpoint
from radio.dist import Ranks
from train.config import DataConfig, OptimConfig, TeacherConfig, TrainConfig
from train.trainer import Trainer

from .tiny_teachers import register

register()

TEACHERS = (
    TeacherConfig(name="clip", model="tiny:clip"),
    TeacherConfig(name="dense", model="tiny:dense"),
    TeacherConfig(name="sam", model="tiny:sam", summary_weight=0.0),
)

CPU = torch.device("cpu")
Start = Callable[..., Trainer]


def image_bytes(seed: int, kind: str = "PNG", size: tuple[int, int] = (40, 52)) -> bytes:
    """A file of smooth noise, `size` as (height, width)."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size[1], size[0])).save(buffer, kind)
    return buffer.getvalue()


def fill_folder(folder: Path, whole: int, broken: int = 0) -> Path:
    """A folder of so many good images, then so many truncated ones."""
    folder.mkdir(parents=True)
    for index in range(whole):
        (folder / f"{index:03d}.png").write_bytes(image_bytes(index))
    for index in range(broken):
        (folder / f"z{index:03d}.jpg").write_bytes(image_bytes(index, "JPEG", (200, 200))[:300])
    return folder


def fill_shard(path: Path, first: int, count: int) -> Path:
    """A tar file of so many images without labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index in range(first, first + count):
            data = image_bytes(index, "JPEG")
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small images."""
    return fill_folder(tmp_path_factory.mktemp("data") / "images", 24)


@pytest.fixture
def config(tmp_path: Path, images: Path) -> TrainConfig:
    """Twelve steps of four images, three teachers, everything in this process."""
    return TrainConfig(
        recipe="test",
        student="vit-tiny12",
        teachers=TEACHERS,
        resolution=48,
        steps=12,
        batch_size=4,
        out=tmp_path / "run",
        data=DataConfig(images=(images,), workers=0),
        optim=OptimConfig(lr=1e-3, warmup=0.25),
        device="cpu",
        log_every=1,
        save_every=5,
    )


@pytest.fixture
def start() -> Start:
    """A function that sets a run up: `start(config, steps=3, ...)`."""

    def begin(config: TrainConfig, *, restart: bool = False, **changes: object) -> Trainer:
        changed = replace(config, **changes)  # type: ignore[arg-type]
        console = Console(file=io.StringIO(), width=200)
        return Trainer(changed, Ranks(), CPU, console, restart=restart)

    return begin


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch's operators have two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def read_records(out: Path) -> list[dict[str, float]]:
    """What `metrics.jsonl` of a run folder says."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    """The loss at every log step of a run folder."""
    return [record["loss"] for record in read_records(out)]


def untimed(out: Path) -> list[dict[str, float]]:
    """The records of a run folder without what a clock measured."""
    timed = ("images_per_second", "data_wait", "seconds", "time/", "perf/", "mfu")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in read_records(out)]


def same_weights(one: Path, other: Path) -> bool:
    """Whether the checkpoints and the newest states of two run folders hold the same tensors."""
    pairs = [[checkpoint.load(out / "ckpt.pt").tensors for out in (one, other)]]
    pairs.append([newest_state(out) for out in (one, other)])
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def newest_state(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest state of a run folder that one process wrote."""
    (file,) = max((out / "state").iterdir()).glob("*.safetensors")
    return load_file(file)
